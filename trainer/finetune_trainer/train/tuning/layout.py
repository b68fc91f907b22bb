"""Measures residual blocks with both layouts of images, and chooses the faster one. Called once by `build`, on GPUs.

Convolutions of 16-bit numbers are usually faster with channels last; normalizations, and convolutions with few
channels, can be slower. Therefore complete residual blocks are measured, forward and backward, at the shapes of the
job. Nothing that is trained changes: the fp32 weights, their gradients and checkpoints keep their layout.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetune_trainer.methods.method import Method
from finetune_trainer.train.tuning.attention import time_call

_LOG = logging.getLogger(__name__)
_MEASURED = 5
"""Measured calls of one block with one layout."""
_LIMIT_SECONDS = 2.0
"""Time after which blocks that are left are not measured; the largest ones come first."""
LAYOUTS = {"channelsLast": torch.channels_last, "contiguous": torch.contiguous_format}
"""The layouts by their recorded names. Of equally fast ones the first one is preferred."""

Measure = Callable[[Callable[[], None]], float]
"""Returns the seconds of a call."""


@dataclass(frozen=True)
class BlockCall:
    """A call of a residual block; calls of blocks with equal shapes are equally fast.

    Attributes:
        block: the block of the first such call.
        args: its arguments; tensors are replaced by their shapes.
        kwargs: its named arguments.
    """

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self, context: contextlib.AbstractContextManager[object]) -> None:
        """Compute the block's output, and the gradients of its inputs and trained weights. Nothing keeps them."""
        args = [_fill(value) for value in self.args]
        kwargs = {name: _fill(value) for name, value in self.kwargs.items()}
        with context:
            output = self.block(*args, **kwargs)
        values = [*args, *kwargs.values(), *self.block.parameters()]
        targets = [value for value in values if isinstance(value, Tensor) and value.requires_grad]
        torch.autograd.grad(output, targets, torch.ones_like(output), allow_unused=True)


@dataclass(frozen=True)
class _Shape:
    """A tensor without its values."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(value: Any) -> Any:
        """Return the shape of a tensor, or another value itself."""
        if not isinstance(value, Tensor):
            return value
        return _Shape(tuple(value.shape), tuple(value.stride()), value.dtype, value.device)


def _fill(value: Any) -> Any:
    if not isinstance(value, _Shape):
        return value
    tensor = torch.empty_strided(value.size, value.stride, dtype=value.dtype, device=value.device).zero_()
    return tensor.requires_grad_(tensor.is_floating_point())


def find_blocks(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the innermost modules that have both a group norm and a convolution of more than one pixel."""
    found = [part for module in modules for part in module.modules() if _is_block(part)]
    ids = {id(part) for part in found}
    return [part for part in found if not any(id(inner) in ids for inner in part.modules() if inner is not part)]


def _is_block(module: nn.Module) -> bool:
    parts = [getattr(child, "base_layer", child) for child in module.children()]
    has_norm = any(isinstance(part, nn.GroupNorm) for part in parts)
    return has_norm and any(isinstance(part, nn.Conv2d) and max(part.kernel_size) > 1 for part in parts)


def count_calls(modules: Sequence[nn.Module], run: Callable[[], object]) -> list[tuple[BlockCall, int]]:
    """Return the calls of residual blocks in a computation and their numbers, those with the most work first."""
    counts: Counter[Any] = Counter()
    calls: dict[Any, BlockCall] = {}

    def count(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        call = BlockCall(block, tuple(map(_Shape.of, args)), {name: _Shape.of(kwargs[name]) for name in kwargs})
        weights = tuple(tuple(parameter.shape) for parameter in block.parameters())
        key = (type(block), weights, repr(call.args), repr(call.kwargs))
        counts[key] += 1
        calls.setdefault(key, call)

    hooks = [block.register_forward_pre_hook(count, with_kwargs=True) for block in find_blocks(modules)]
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return sorted(((calls[key], counts[key]) for key in counts), key=lambda each: -each[1] * _work(each[0]))


def _work(call: BlockCall) -> int:
    """Return a number that grows with the arithmetic of a call."""
    pixels = max((shape.size[0] * shape.size[-1] * shape.size[-2] for shape in _images(call)), default=0)
    return pixels * sum(parameter.numel() for parameter in call.block.parameters() if parameter.dim() == 4)


def _images(call: BlockCall) -> list[_Shape]:
    values = [*call.args, *call.kwargs.values()]
    return [value for value in values if isinstance(value, _Shape) and len(value.size) == 4]


def measure_layouts(
    method: Method,
    calls: Sequence[tuple[BlockCall, int]],
    measure: Measure,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, float]:
    """Return the seconds of the residual blocks of a pass by layout. The method then has the last layout.

    Args:
        method: its layout is changed.
        calls: the calls and their numbers, those with the most work first.
        measure: measures a call.
        clock: seconds.
    """
    totals: dict[str, float] = {}
    measured = list(calls)
    for name, layout in LAYOUTS.items():
        method.use_layout(layout)
        began, total = clock(), 0.0
        for number, (call, count) in enumerate(measured):
            if clock() - began > _LIMIT_SECONDS and not totals:
                measured = measured[:number]
                _LOG.info("layout: the remaining %d shapes are not measured", len(calls) - number)
                break
            moved = _with_layout(call, layout)
            total += count * measure(lambda call=moved: call.run(method.forward_context()))  # type: ignore[misc]
        totals[name] = total
    return totals


def _with_layout(call: BlockCall, layout: torch.memory_format) -> BlockCall:
    """Return the call with images in a layout."""

    def move(value: Any) -> Any:
        if not isinstance(value, _Shape) or len(value.size) != 4:
            return value
        stride = torch.empty(value.size, device="meta").contiguous(memory_format=layout).stride()
        return _Shape(value.size, tuple(stride), value.dtype, value.device)

    return BlockCall(call.block, tuple(map(move, call.args)), {name: move(call.kwargs[name]) for name in call.kwargs})


def fastest(seconds: Mapping[str, float]) -> str:
    """Return the name of the layout that takes the least time; of equal ones, the first."""
    return min(seconds, key=seconds.__getitem__)


def describe(seconds: Mapping[str, float]) -> str:
    """Return a message about the choice."""
    chosen = fastest(seconds)
    slower = max(seconds.values())
    share = 0.0 if slower <= 0 else 1 - seconds[chosen] / slower
    words = {"channelsLast": "channels last", "contiguous": "channels first"}[chosen]
    return f"images {words}: residual blocks take {100 * share:.0f} % less time than with the other layout on this GPU"


def measure_on_gpu(device: torch.device) -> Measure:
    """Return the function that measures a call on a GPU. The first call lets cuDNN choose its kernels."""

    def measure(call: Callable[[], None]) -> float:
        with torch.compiler.set_stance("force_eager"):
            call()
            return min(time_call(call, device) for _ in range(_MEASURED))

    return measure
