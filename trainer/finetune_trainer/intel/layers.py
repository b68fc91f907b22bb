"""Linear layers and convolutions of a model that IPEX computes. Called by `methods`.

Frozen layers are replaced by IPEX's: their weights exist in its packed layout only. Trained layers stay in the model,
with their plain weights, and compute with a packed copy that is updated once per step. So the optimizer, the exchange
of gradients, checkpoints and exports see plain weights: a job can continue with IPEX or without it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finetune_trainer.intel.extension import optimize_layers

_FORMATS = (torch.bfloat16, torch.float32)
_LOG = logging.getLogger(__name__)


def optimize_frozen(module: nn.Module) -> int:
    """Let IPEX compute the frozen layers of a module. The module can no longer be copied or saved.

    Args:
        module: the module. Layers with an adapter keep their weights, which the adapters read.

    Returns:
        The number of layers.
    """
    places = [place for place in _places(module) if _is_frozen(place[2])]
    if not places:
        return 0
    optimized = optimize_layers([layer for _, _, layer in places], None)
    for (owner, name, before), layer in zip(places, optimized, strict=True):
        if layer is not before:
            layer.train(before.training)
            owner._modules[name] = layer
    _LOG.info("IPEX computes %d frozen layers of %s", len(places), type(module).__name__)
    return len(places)


def align_group_norms(module: nn.Module) -> None:
    """Give the gradients of group norms the layout of their inputs, without which IPEX's backward pass fails."""

    def align(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        aligned: Tensor = _Aligned.apply(output, inputs[0].stride())
        return aligned

    for layer in module.modules():
        if isinstance(layer, nn.GroupNorm):
            layer.register_forward_hook(align)


class TrainedLayers:
    """Trained layers of some modules that IPEX computes.

    Args:
        modules: the modules.
        optimizer: the optimizer of their weights.
    """

    def __init__(self, modules: Sequence[nn.Module], optimizer: torch.optim.Optimizer) -> None:
        layers = [layer for module in modules for _, _, layer in _places(module) if layer.weight.requires_grad]
        self._packed: list[_PackedLayer] = []
        if not layers:
            return
        optimized = optimize_layers([_copy_of(layer) for layer in layers], optimizer)
        self._packed = [
            _PackedLayer(layer, counterpart)
            for layer, counterpart in zip(layers, optimized, strict=True)
            if hasattr(counterpart, "ctx")
        ]
        _LOG.info("IPEX computes %d trained layers", len(self._packed))

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self._packed)

    @torch.no_grad()
    def refresh(self) -> None:
        """Pack the weights, after they have changed."""
        for layer in self._packed:
            layer.pack()


class _PackedLayer:
    """A trained layer with a packed copy of its weight.

    Args:
        layer: the layer; its forward then uses the copy.
        counterpart: IPEX's layer of the same weight.
    """

    def __init__(self, layer: Any, counterpart: Any) -> None:
        self._layer, self._counterpart, self._operation = layer, counterpart, counterpart.ctx
        # Its own copies are not used.
        counterpart.weight_wrapper = counterpart.bias_wrapper = None
        layer.forward = self._make_forward()

    def pack(self) -> None:
        weight = self._layer.weight.detach()
        if weight.dim() == 4:
            weight = weight.contiguous(memory_format=torch.channels_last)
        self._operation.get_weight().copy_(self._operation.pack(weight))

    def _make_forward(self) -> Callable[[Tensor], Tensor]:
        layer, counterpart, operation = self._layer, self._counterpart, self._operation
        handle = operation.get_data_handle()
        is_convolution = isinstance(layer, nn.Conv2d)

        def forward(x: Tensor) -> Tensor:
            weight = _Packed.apply(layer.weight, operation)
            output: Tensor
            if is_convolution:
                output = torch.ops.torch_ipex.convolution_forward(
                    x,
                    weight,
                    layer.bias,
                    handle,
                    counterpart.weight_size,
                    counterpart._real_padding,
                    layer.stride,
                    layer.dilation,
                    counterpart.weight_channels_last,
                )
            else:
                output = torch.ops.torch_ipex.ipex_linear(x, weight, layer.bias, handle, layer.out_features)
            return output

        return forward


class _Packed(torch.autograd.Function):
    """The packed copy of a weight; backward unpacks its gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, operation: Any) -> Tensor:
        del weight
        ctx.operation = operation
        packed: Tensor = operation.get_weight().detach()
        return packed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.operation.to_public(gradients[0].contiguous()), None


class _Aligned(torch.autograd.Function):
    """The same values; backward gives their gradient certain strides."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, strides: tuple[int, ...]) -> Tensor:
        ctx.strides = strides
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]
        if gradient.stride() == ctx.strides:
            return gradient, None
        aligned = torch.empty_strided(gradient.shape, ctx.strides, dtype=gradient.dtype, device=gradient.device)
        return aligned.copy_(gradient), None


def _places(module: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Yield owner, name and layer of each layer that IPEX can compute and whose weight nothing else reads."""
    read = _read_elsewhere(module)
    for owner in module.modules():
        for name, layer in owner.named_children():
            if id(layer) not in read and _is_supported(layer):
                yield owner, name, layer


def _read_elsewhere(module: nn.Module) -> Collection[int]:
    """Return the ids of modules whose weights are read outside of them: those of adapters, and shared weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: PLC0415  slow to import

    found = {id(part) for layer in module.modules() if isinstance(layer, BaseTunerLayer) for part in layer.modules()}
    owners: dict[int, list[int]] = {}
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(id(part))
    return found | {part for parts in owners.values() if len(parts) > 1 for part in parts}


def _is_supported(layer: nn.Module) -> bool:
    if type(layer) is nn.Linear:
        return layer.weight.dtype in _FORMATS
    return type(layer) is nn.Conv2d and layer.weight.dtype in _FORMATS and layer.padding_mode == "zeros"


def _is_frozen(layer: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in layer.parameters())


def _copy_of(layer: Any) -> nn.Module:
    """Return a layer with copies of the weights of a linear layer or convolution, which IPEX packs in place."""
    with torch.device("meta"):
        copy = _like(layer)
    for name, parameter in layer.named_parameters(recurse=False):
        copy.register_parameter(name, nn.Parameter(parameter.detach().clone()))
    return copy


def _like(layer: Any) -> nn.Module:
    has_bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, layer.out_features, has_bias)
    return nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        has_bias,
    )
