"""Measures the attention kernels of the device, and chooses the fastest ones. Called once by `build`, on GPUs.

Which kernel is fastest depends on the GPU, on the release of torch and on the shapes: cuDNN's is on some GPUs, flash
attention on others. Each distinct shape of the model is measured, forward and backward, in less than a second together.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from finetune_contract.spec import Attention
from finetune_trainer.methods.kernels import ATTENTION_BACKENDS

_LOG = logging.getLogger(__name__)
_MEASURED = 5
"""Measured calls of one kernel with one shape."""
_LIMIT_SECONDS = 1.0
"""Time after which shapes that are left are not measured; the most frequent ones come first."""
_FUSED = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
"""Kernels that do not store the complete matrix of weights. torch's plain one is used only if no other supports a
shape."""

Measure = Callable[["AttentionShape", SDPBackend], float | None]


@dataclass(frozen=True)
class AttentionShape:
    """All that decides the speed of an attention call.

    Attributes:
        query: shape of the queries (n, heads, tokens, size of a head).
        key: shape of the keys and values.
        dtype: their number format.
        has_mask: whether a mask is added.
        is_causal: whether tokens attend to earlier ones only.
    """

    query: tuple[int, ...]
    key: tuple[int, ...]
    dtype: torch.dtype
    has_mask: bool = False
    is_causal: bool = False


class ShapeCounter(TorchFunctionMode):
    """Counts the attention calls within its block, by shape."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[AttentionShape] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Count one call, and run it."""
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            query, key = (args[number] if len(args) > number else kwargs[name] for number, name in enumerate(_INPUTS))
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            shape = AttentionShape(
                tuple(query.shape), tuple(key.shape), query.dtype, mask is not None, bool(kwargs.get("is_causal"))
            )
            self.counts[shape] += 1
        return func(*args, **kwargs)


_INPUTS = ("query", "key")


def count_shapes(run: Callable[[], object]) -> Counter[AttentionShape]:
    """Return the attention calls of a computation, by shape. Compiled blocks run without the compiler."""
    counter = ShapeCounter()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), counter:
        run()
    return counter.counts


def order_backends(
    counts: Mapping[AttentionShape, int],
    measure: Measure,
    backends: Iterable[SDPBackend] = _FUSED,
    clock: Callable[[], float] = time.monotonic,
) -> list[SDPBackend]:
    """Return the kernels in the order in which torch should try them; empty if no call could be measured.

    A kernel that does not support a shape leaves it to the next ones, so its time there is that of the fastest other.

    Args:
        counts: number of calls of a pass by shape.
        measure: returns the seconds of a call and its backward pass; None if the kernel does not support the shape.
        backends: the kernels to measure; of equally fast ones the first one is preferred.
        clock: seconds.
    """
    candidates, began = list(backends), clock()
    totals = dict.fromkeys(candidates, 0.0)
    is_supported: set[SDPBackend] = set()
    for shape, count in sorted(counts.items(), key=lambda item: -item[1] * _work(item[0])):
        if clock() - began > _LIMIT_SECONDS:
            _LOG.info("attention: the remaining shapes are not measured")
            break
        seconds = {backend: taken for backend in candidates if (taken := measure(shape, backend)) is not None}
        if not seconds:
            continue
        is_supported.update(seconds)
        best = min(seconds.values())
        for backend in candidates:
            totals[backend] += count * seconds.get(backend, best)
    if not is_supported:
        return []
    order = sorted((backend for backend in candidates if backend in is_supported), key=lambda each: totals[each])
    # The others stay enabled, for shapes that the fastest kernel does not support.
    return [*order, *(backend for backend in candidates if backend not in is_supported), SDPBackend.MATH]


def _work(shape: AttentionShape) -> int:
    """Return a number that grows with the arithmetic of a call."""
    return shape.query[-2] * shape.key[-2] * shape.query[-1] * shape.query[0]


def measure_on_gpu(device: torch.device) -> Measure:
    """Return the function that measures a kernel on a GPU."""

    def measure(shape: AttentionShape, backend: SDPBackend) -> float | None:
        like: dict[str, Any] = {"dtype": shape.dtype, "device": device}
        query = torch.zeros(shape.query, **like, requires_grad=True)
        key, value = (torch.zeros(shape.key, **like, requires_grad=True) for _ in range(2))
        mask = torch.zeros((shape.query[0], 1, 1, shape.key[-2]), **like) if shape.has_mask else None

        def call() -> None:
            output = nn.functional.scaled_dot_product_attention(query, key, value, mask, is_causal=shape.is_causal)
            torch.autograd.backward(output, torch.ones_like(output))

        try:
            with sdpa_kernel(backend):
                call()
                return min(time_call(call, device) for _ in range(_MEASURED))
        except RuntimeError:
            # Not supported, or it needs more memory than there is.
            return None

    return measure


def time_call(call: Callable[[], None], device: torch.device) -> float:
    """Return the seconds that a GPU needs for the operations of a call."""
    stream = torch.cuda.current_stream(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record(stream)
    call()
    end.record(stream)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def names_of(backends: Sequence[SDPBackend]) -> list[str]:
    """Return the names of kernels, as manifests write them."""
    names = {backend: attention.value for attention, backend in ATTENTION_BACKENDS.items()}
    return [names[backend] for backend in backends]


def backends_of(names: object) -> list[SDPBackend]:
    """Return the kernels of recorded names. A later version may have recorded others, which are left out."""
    found = []
    for name in names if isinstance(names, list) else []:
        with contextlib.suppress(ValueError, KeyError):
            found.append(ATTENTION_BACKENDS[Attention(name)])
    return found


def describe(backends: Sequence[SDPBackend]) -> str:
    """Return a message about the choice; empty for torch's own order."""
    return f"attention {names_of(backends)[0]}: the fastest kernel for this model on this GPU" if backends else ""
