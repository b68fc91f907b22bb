"""Linear layers and convolutions of a model that IPEX computes. Called by `methods`.

Frozen layers are replaced by IPEX's: their weights exist in its packed layout only. Trained layers stay in the model,
with their plain weights, and compute with a packed copy that is updated once per step. So the optimizer, the exchange
of gradients, checkpoints and exports see plain weights: a job can continue with IPEX or without it.

The layout in which a convolution's weight is packed depends on the shape of its input. IPEX repacks a weight of another
layout in each pass, for which oneDNN has no fast code: 85 ms for a convolution that takes 1 ms. So a convolution is
packed when its first input arrives, and again for each shape that needs another layout.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
    linear = [place for place in places if isinstance(place[2], nn.Linear)]
    if linear:
        optimized = optimize_layers([layer for _, _, layer in linear], None)
        for (owner, name, before), layer in zip(linear, optimized, strict=True):
            if layer is not before:
                layer.train(before.training)
                owner._modules[name] = layer
    for owner, name, layer in places:
        if isinstance(layer, nn.Conv2d):
            owner._modules[name] = _FrozenConvolution(layer)
    if places:
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
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        layers = [layer for module in modules for _, _, layer in _places(module) if layer.weight.requires_grad]
        self._packed = [_TrainedLayer(layer) for layer in layers]
        if layers:
            _LOG.info("IPEX computes %d trained layers", len(layers))

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self._packed)

    @torch.no_grad()
    def refresh(self) -> None:
        """Pack the weights, after they have changed."""
        for layer in self._packed:
            layer.pack()


class _Layouts:
    """IPEX's counterparts of one layer: one for each layout that its inputs need.

    Args:
        make: returns a counterpart for the shape of an input.
    """

    def __init__(self, make: Callable[[torch.Size], Any]) -> None:
        self._make = make
        self._by_shape: dict[torch.Size, Any] = {}
        self.counterparts: list[Any] = []

    @torch.no_grad()
    def of(self, shape: torch.Size) -> Any:
        """Return the counterpart for inputs of a shape."""
        counterpart = self._by_shape.get(shape)
        if counterpart is None:
            counterpart = self._by_shape[shape] = self._find_or_keep(self._make(shape))
        return counterpart

    def _find_or_keep(self, new: Any) -> Any:
        for known in self.counterparts:
            if _have_one_layout(known, new):
                return known
        self.counterparts.append(new)
        return new


def _have_one_layout(first: Any, second: Any) -> bool:
    """Return whether two counterparts of a layer pack its weight in the same way."""
    # The weights do not tell: all layouts of zeros are equal.
    numbers = torch.arange(math.prod(first.weight_size)).remainder_(251).view(first.weight_size)
    numbers = numbers.to(first.ctx.get_weight().dtype, memory_format=torch.channels_last)
    return torch.equal(first.ctx.pack(numbers), second.ctx.pack(numbers))


class _FrozenConvolution(nn.Module):
    """A frozen convolution that IPEX computes. Its plain weight is freed when its first input arrives.

    Args:
        layer: the convolution.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.train(layer.training)
        # In a list, so that it is no part of the module: the weight is packed in place.
        self._plain = [layer]
        self._layouts = _Layouts(self._make)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self._layouts.of(x.shape)(x)
        return output

    def _make(self, shape: torch.Size) -> Any:
        plain = self._plain.pop() if self._plain else _unpacked(self._layouts.counterparts[0])
        return _optimize(plain, shape, is_trained=False).train(self.training)


def _unpacked(counterpart: Any) -> nn.Module:
    """Return a plain convolution with the weights of IPEX's counterpart of a frozen one."""
    weights = {"weight": counterpart.ctx.to_public(counterpart.ctx.get_weight())}
    if counterpart.bias is not None:
        weights["bias"] = counterpart.bias.detach()
    return _with(counterpart, weights, is_trained=False)


class _TrainedLayer:
    """A trained layer with packed copies of its weight.

    Args:
        layer: the layer; its forward then uses a copy.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._layouts = _Layouts(self._make)
        layer.forward = self._forward

    def pack(self) -> None:
        weight = self._layer.weight.detach()
        if weight.dim() == 4:
            weight = weight.contiguous(memory_format=torch.channels_last)
        for counterpart in self._layouts.counterparts:
            counterpart.ctx.get_weight().copy_(counterpart.ctx.pack(weight))

    def _make(self, shape: torch.Size) -> Any:
        counterpart = _optimize(_copy_of(self._layer), shape, is_trained=True)
        # Its own copies are not used.
        counterpart.weight_wrapper = counterpart.bias_wrapper = None
        return counterpart

    def _forward(self, x: Tensor) -> Tensor:
        layer = self._layer
        is_convolution = isinstance(layer, nn.Conv2d)
        counterpart = self._layouts.of(x.shape if is_convolution else torch.Size())
        operation = counterpart.ctx
        weight = _Packed.apply(layer.weight, operation)
        output: Tensor
        if is_convolution:
            output = torch.ops.torch_ipex.convolution_forward(
                x,
                weight,
                layer.bias,
                operation.get_data_handle(),
                counterpart.weight_size,
                counterpart._real_padding,
                layer.stride,
                layer.dilation,
                counterpart.weight_channels_last,
            )
        else:
            handle = operation.get_data_handle()
            output = torch.ops.torch_ipex.ipex_linear(x, weight, layer.bias, handle, layer.out_features)
        return output


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


def _optimize(layer: Any, shape: torch.Size, is_trained: bool) -> Any:
    """Return IPEX's counterpart of a layer. The layer's weight is packed in place.

    Args:
        layer: the layer.
        shape: shape of its inputs; empty: any.
        is_trained: whether its weight is trained.
    """
    if shape:
        layer.input_shape = shape
    # IPEX changes the optimizer that it is given.
    optimizer = torch.optim.SGD(layer.parameters()) if is_trained else None
    return optimize_layers([layer], optimizer)[0]


def _copy_of(layer: Any) -> nn.Module:
    """Return a layer with a copy of the weight, which IPEX packs in place, and with the same bias, which it reads."""
    weights = {"weight": layer.weight.detach().clone()}
    if layer.bias is not None:
        weights["bias"] = layer.bias.detach()
    return _with(layer, weights, is_trained=True)


def _with(layer: Any, weights: Mapping[str, Tensor], is_trained: bool) -> nn.Module:
    """Return a layer of the same kind with other weights."""
    with torch.device("meta"):
        made = _like(layer)
    for name, weight in weights.items():
        made.register_parameter(name, nn.Parameter(weight, is_trained))
    return made


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
