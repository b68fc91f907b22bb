"""Measures the layers of a denoiser with each library and number format, in a process of its own.

The import of IPEX changes operations of torch in the whole process. So native layers are measured first, and the rank
that starts this process stays as it is. Only the layers that take most of the time are measured, for about a second.

Usage: python -m finetune_trainer.train.tuning.layer_probe < REQUEST, which prints {"path": seconds} as its last line.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetune_contract.spec import Precision, TrainingSpec
from finetune_trainer.intel.layers import TrainedLayers, optimize_frozen
from finetune_trainer.intel.paths import ComputePath
from finetune_trainer.methods.packed_conv import pack_convolutions
from finetune_trainer.models.family import IMAGE_SIZES, Family
from finetune_trainer.performance.flops import META, weightless_denoiser

LIMIT_SECONDS = 1.0
"""Time for all measurements. Each measured layer is measured with every path."""
_MEASURED = 4
"""Measured calls of one layer; the fastest counts, because other load on the machine only adds time."""
_NUM_TOKENS = 77
_DTYPES = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16}
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerShape:
    """All that decides the speed of a layer.

    Attributes:
        input: shape of its input.
        outputs: number of output channels or features.
        kernel: size of a convolution's kernel; 0 for a linear layer.
        stride: stride of a convolution.
        padding: padding of a convolution.
    """

    input: tuple[int, ...]
    outputs: int
    kernel: int = 0
    stride: int = 1
    padding: int = 0

    @property
    def work(self) -> float:
        """A number that is proportional to the arithmetic of a call."""
        if not self.kernel:
            return float(math.prod(self.input) * self.outputs)
        return math.prod(self.input) * self.outputs * self.kernel**2 / self.stride**2

    def make(self, dtype: torch.dtype) -> nn.Module:
        """Return a layer of this shape with random weights."""
        if not self.kernel:
            return nn.Linear(self.input[-1], self.outputs, dtype=dtype)
        return nn.Conv2d(self.input[1], self.outputs, self.kernel, self.stride, self.padding, dtype=dtype)


@torch.no_grad()
def count_layers(family: Family, training: TrainingSpec) -> Counter[LayerShape]:
    """Return the linear layers and convolutions of the denoiser by shape, for a micro-batch; without weights."""
    denoiser: Any = weightless_denoiser(family)
    counts: Counter[LayerShape] = Counter()

    def count(layer: Any, arguments: tuple[Any, ...], _: object) -> None:
        shape = tuple(arguments[0].shape)
        if isinstance(layer, nn.Linear):
            counts[LayerShape(shape, layer.out_features)] += 1
        elif layer.groups == 1:
            sizes = (layer.kernel_size[0], layer.stride[0], int(layer.padding[0]))
            counts[LayerShape(shape, layer.out_channels, *sizes)] += 1

    for layer in denoiser.modules():
        if type(layer) in {nn.Linear, nn.Conv2d}:
            layer.register_forward_hook(count)
    size = training.batch_size
    latents = torch.zeros(size, *family.latent_shape(training.resolution, training.resolution), device=META)
    conditions = family.conditions(_empty_text(denoiser.config, size), torch.float32)
    family.predict(denoiser, latents, torch.zeros(size, dtype=torch.int64, device=META), conditions)
    return counts


def _empty_text(config: Mapping[str, Any], size: int) -> dict[str, Tensor]:
    def empty(*shape: int) -> Tensor:
        return torch.zeros(size, *shape, device=META)

    width = config["cross_attention_dim"]
    # Models of several widths name one for each level.
    width = width if isinstance(width, int) else width[0]
    pooled = config.get("projection_class_embeddings_input_dim") or 0
    pooled -= 6 * (config.get("addition_time_embed_dim") or 0)
    return {"hidden": empty(_NUM_TOKENS, width), "pooled": empty(max(0, pooled)), IMAGE_SIZES: empty(6)}


def make_request(counts: Mapping[LayerShape, int], paths: Iterable[ComputePath], is_trained: bool) -> str:
    """Return the input of the process.

    Args:
        counts: the layers.
        paths: what to measure.
        is_trained: whether their weights are trained.
    """
    return json.dumps(
        {
            "layers": [{"shape": asdict(shape), "count": count} for shape, count in counts.items()],
            "paths": [{"precision": path.precision.value, "ipex": path.uses_ipex} for path in paths],
            "trained": is_trained,
        }
    )


def measure_paths(
    counts: Mapping[LayerShape, int],
    paths: Sequence[ComputePath],
    measure: Callable[[LayerShape, ComputePath], float],
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, float]:
    """Return the seconds of the most expensive layers of a pass with each path, by its name.

    A path that fails is left out.

    Args:
        counts: number of calls of a pass by shape.
        paths: what to measure. Those with IPEX are measured last.
        measure: returns the seconds of a call and its backward pass.
        clock: seconds.
    """
    order = sorted(counts, key=lambda shape: (-counts[shape] * shape.work, shape.input, shape.outputs))
    seconds: dict[str, float] = {}
    for path in sorted(paths, key=lambda each: each.uses_ipex):
        began, total, measured = clock(), 0.0, 0
        try:
            for shape in order:
                total += counts[shape] * measure(shape, path)
                measured += 1
                if not seconds and clock() - began > LIMIT_SECONDS / len(paths):
                    break
        except Exception as error:
            # Which operations a library supports depends on the processor and on its version.
            _LOG.warning("%s cannot be measured: %r", path.name, error)
            continue
        if not seconds:
            # The other paths are measured with the same layers.
            order = order[:measured]
        seconds[path.name] = total
    return seconds


def measure_layer(shape: LayerShape, path: ComputePath, is_trained: bool) -> float:
    """Return the seconds of a call of a layer and its backward pass."""
    dtype = _DTYPES[path.precision]
    layer = nn.Sequential(shape.make(dtype)).requires_grad_(is_trained)
    packed = None
    if path.uses_ipex and is_trained:
        packed = TrainedLayers([layer])
    elif path.uses_ipex:
        optimize_frozen(layer)
    elif not is_trained:
        pack_convolutions(layer)
    x = torch.zeros(shape.input, dtype=dtype)
    if shape.kernel:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()

    def call() -> None:
        if packed is not None:
            packed.refresh()
        output = layer(x)
        torch.autograd.backward(output, torch.ones_like(output))

    call()
    return min(_time(call) for _ in range(_MEASURED))


def _time(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    """Measure what the request on stdin names."""
    request = json.load(sys.stdin)
    counts = {_read_shape(each["shape"]): each["count"] for each in request["layers"]}
    paths = [ComputePath(Precision(each["precision"]), each["ipex"]) for each in request["paths"]]
    found = measure_paths(counts, paths, lambda shape, path: measure_layer(shape, path, request["trained"]))
    sys.stdout.write(f"{json.dumps(found)}\n")


def _read_shape(values: Mapping[str, Any]) -> LayerShape:
    return LayerShape(**{**values, "input": tuple(values["input"])})


if __name__ == "__main__":
    main()
