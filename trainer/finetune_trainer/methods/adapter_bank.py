"""Low-rank adapters in flat storage, computed as few large operations; the mathematics is peft's.

A UNet of SDXL has 560 adapted layers with two small matrices each. One by one they are cast, multiplied and scaled in
14,000 launches a step, which takes a GPU's host longer than the GPU needs for the work. Here

- the fp32 weights of all adapters of a module are views into one tensor, and one copy of it per pass has the number
  format of the activations and the scale alpha / rank in it;
- layers with a common input are one group: their frozen weights and their adapters are multiplied together. These are
  queries, keys and values of a self-attention, and keys and values of all cross-attentions of equal width;
- backward adds the gradients of all adapters into one tensor, which is converted to fp32 once per pass.

Called by `lora`. Compiled blocks and CPUs, where launches cost nothing, use `lora_linear` or peft instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from finetune_trainer.methods.adapted_attention import AdaptedAttention, TextProjections, find_attention, takes_text
from finetune_trainer.methods.adapter_group import AdapterGroup, Magnitudes, Matrices


class AdapterBank:
    """The adapters of one module.

    Args:
        groups: peft's linear layers; those of a group have the same input, rank and scale and equal shapes.
        dtype: number format of the activations.
    """

    def __init__(self, groups: Sequence[Sequence[Any]], dtype: torch.dtype) -> None:
        layers = [layer for group in groups for layer in group]
        matrices = [_down(layer) for layer in layers] + [_up(layer) for layer in layers]
        magnitudes = [_magnitude(layer) for layer in layers if _uses_dora(layer)]
        self._parameters = matrices + magnitudes
        self._sizes = [parameter.numel() for parameter in self._parameters]
        self._num_down = sum(self._sizes[: len(layers)])
        num_matrices = sum(self._sizes[: len(matrices)])
        self._scale = float(layers[0].scaling["default"])
        self._master = torch.cat([parameter.data.flatten() for parameter in self._parameters])
        self._working = torch.empty_like(self._master[:num_matrices], dtype=dtype)
        self._gradients = torch.zeros_like(self._working)
        self._magnitude_gradients = torch.zeros_like(self._master[num_matrices:])
        self.anchor = self._working.new_empty(0)
        """Connects the adapted layers of a pass with the parameters in the graph."""
        self.text = TextProjections(self)
        """Keys and values of the cross-attentions."""
        for parameter, flat in zip(self._parameters, torch.split(self._master, self._sizes), strict=True):
            parameter.data = flat.view(parameter.shape)
        self.groups = self._make_groups(groups, bool(magnitudes))

    def _make_groups(self, groups: Sequence[Sequence[Any]], uses_dora: bool) -> list[AdapterGroup]:
        num_layers = sum(len(group) for group in groups)
        starts = [0, *accumulate(self._sizes)]
        num_matrices = starts[2 * num_layers]
        made: list[AdapterGroup] = []
        for first, last in pairwise([0, *accumulate(len(group) for group in groups)]):
            layers = groups[len(made)]
            down = slice(starts[first], starts[last])
            up = slice(starts[num_layers + first], starts[num_layers + last])
            weight, bias = _stack_frozen(layers)
            magnitudes = None
            if uses_dora:
                own = slice(starts[2 * num_layers + first], starts[2 * num_layers + last])
                values = self._master[own].view(len(layers), -1)
                gradients = self._magnitude_gradients[own.start - num_matrices : own.stop - num_matrices]
                magnitudes = _make_magnitudes(values, gradients.view_as(values), weight)
            made.append(
                AdapterGroup(
                    layers=tuple(layers),
                    weight=weight,
                    bias=bias,
                    adapters=_matrices(self._working[down], self._working[up], layers),
                    gradients=_matrices(self._gradients[down], self._gradients[up], layers),
                    scale=self._scale,
                    dropout=_dropout(layers[0]),
                    magnitudes=magnitudes,
                )
            )
        return made

    def start_pass(self, *_: object) -> None:
        """Copy the weights for a forward pass."""
        self.anchor = _Pass.apply(self, *self._parameters)

    def refresh(self) -> None:
        """Compute everything that depends on the fp32 weights, and drop gradients of a pass that failed."""
        num_matrices = len(self._working)
        self._drop_gradients()
        self._working[: self._num_down].copy_(self._master[: self._num_down])
        torch.mul(self._master[self._num_down : num_matrices], self._scale, out=self._working[self._num_down :])
        for group in self.groups:
            group.refresh()

    def _drop_gradients(self) -> None:
        self._gradients.zero_()
        if len(self._magnitude_gradients):
            self._magnitude_gradients.zero_()

    def end_pass(self) -> Sequence[Tensor | None]:
        """Return the gradients of the pass in fp32, one for each parameter; none if they were added to buffers."""
        self.text.clear()
        held = _held_gradients(self._parameters)
        if held is None:
            return self._take_gradients()
        num_matrices, first = len(self._gradients), 0
        for gradients in held:
            # A part of the gradients of the matrices, then one of those of the magnitudes.
            own = slice(first, min(first + len(gradients), num_matrices))
            num_own = max(0, own.stop - first)
            if num_own:
                gradients[:num_own].add_(self._gradients[own])
            if num_own < len(gradients):
                rest = first + num_own - num_matrices
                gradients[num_own:].add_(self._magnitude_gradients[rest : rest + len(gradients) - num_own])
            first += len(gradients)
        self._drop_gradients()
        # Autograd still calls the hooks of each parameter, which start the exchange of full buckets.
        return [None] * len(self._parameters)

    def _take_gradients(self) -> list[Tensor]:
        parts = [self._gradients, self._magnitude_gradients]
        taken = torch.cat([parts[0].float(), parts[1]]) if len(parts[1]) else parts[0].to(torch.float32, copy=True)
        self._drop_gradients()
        views = torch.split(taken, self._sizes)
        return [view.view(parameter.shape) for view, parameter in zip(views, self._parameters, strict=True)]


def use_adapter_bank(module: nn.Module, dtype: torch.dtype) -> None:
    """Compute the adapted linear layers of a module from flat storage.

    Args:
        module: a module whose layers have adapters. Its parameters have their final device and format.
        dtype: number format of the activations.
    """
    from peft.tuners.lora.layer import Linear  # noqa: PLC0415  slow to import

    single = {id(layer): layer for layer in module.modules() if isinstance(layer, Linear)}
    if not single:
        return
    attentions = list(find_attention(module, lambda layer: id(layer) in single))
    for attention in attentions:
        for layer in attention.grouped:
            del single[id(layer)]
    queries = [attention for attention in attentions if id(attention.block.to_q) in single]
    for attention in queries:
        del single[id(attention.block.to_q)]
    own, shared = _by_input(attentions, takes_text(module))
    bank = AdapterBank(
        [
            *(attention.grouped for attention in own),
            *([layer for attention in members for layer in attention.grouped] for members in shared),
            *([attention.block.to_q] for attention in queries),
            *([layer] for layer in single.values()),
        ],
        dtype,
    )
    groups = iter(bank.groups)
    for attention in own:
        attention.use_group(next(groups), bank)
    for members in shared:
        bank.text.add(next(groups), members)
    for attention in queries:
        attention.use_query(next(groups), bank)
    for layer, group in zip(single.values(), groups, strict=True):
        layer.forward = _forward_of(group, bank)
    _connect(module, bank, bool(shared))


def _by_input(
    attentions: Sequence[AdaptedAttention], shares_text: bool
) -> tuple[list[AdaptedAttention], list[list[AdaptedAttention]]]:
    """Return the attention blocks with an own input, and the others by what their keys and values have in common."""
    own: list[AdaptedAttention] = []
    shared: dict[tuple[Any, ...], list[AdaptedAttention]] = {}
    for attention in attentions:
        if shares_text and attention.block.is_cross_attention:
            layer = attention.grouped[0]
            key = (tuple(layer.base_layer.weight.shape), layer.base_layer.bias is None, attention.block.heads)
            shared.setdefault(key, []).append(attention)
        else:
            own.append(attention)
    return own, list(shared.values())


def _connect(module: nn.Module, bank: AdapterBank, shares_text: bool) -> None:
    """Start a pass of the bank before each forward of the module."""
    if not shares_text:
        module.register_forward_pre_hook(bank.start_pass)
        return

    def start(_: nn.Module, args: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        bank.start_pass()
        # The third argument of every denoiser of diffusers that has this name.
        bank.text.start(arguments["encoder_hidden_states"] if "encoder_hidden_states" in arguments else args[2])

    def end(*_: object) -> None:
        if not torch.is_grad_enabled():
            bank.text.clear()

    module.register_forward_pre_hook(start, with_kwargs=True)
    module.register_forward_hook(end)


class _Pass(torch.autograd.Function):
    """Makes all parameters inputs of the graph of one pass; backward runs after that of all adapted layers."""

    @staticmethod
    def forward(ctx: Any, bank: AdapterBank, *_: Tensor) -> Tensor:
        bank.refresh()
        ctx.bank = bank
        ctx.set_materialize_grads(False)
        return bank.anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *ctx.bank.end_pass()


def _held_gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor] | None:
    """Return the gradients of all parameters as few tensors, if those of neighbours are neighbours in a buffer.

    Autograd would add to each of them separately. None if it must, because a hook reads what is added.
    """
    runs: list[tuple[Tensor, int]] = []
    """First gradient and length of neighbours."""
    storage, offset = -1, -1
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None or gradient.dtype is not torch.float32 or not gradient.is_contiguous():
            return None
        if gradient.untyped_storage().data_ptr() == storage and gradient.storage_offset() == offset:
            runs[-1] = runs[-1][0], runs[-1][1] + gradient.numel()
        else:
            runs.append((gradient, gradient.numel()))
        storage = gradient.untyped_storage().data_ptr()
        offset = int(gradient.storage_offset()) + gradient.numel()
    if any(parameter._backward_hooks for parameter in parameters) or len(runs) > _MAX_RUNS:
        return None
    return [first.as_strided((length,), (1,), first.storage_offset()) for first, length in runs]


_MAX_RUNS = 32
"""Most additions of a pass; the gradients of more parts are left to autograd."""


def _forward_of(group: AdapterGroup, bank: AdapterBank) -> Any:
    """Return a forward for the only layer of a group."""

    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        (output,) = group.rows(x, bank.anchor)
        return output

    return forward


def _make_magnitudes(values: Tensor, gradients: Tensor, weight: Tensor) -> Magnitudes:
    rows = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
    return Magnitudes(
        values=values,
        gradients=gradients,
        frozen=rows.view_as(values),
        norms=torch.empty_like(values),
        factors=torch.empty_like(values, dtype=weight.dtype),
    )


def _matrices(down: Tensor, up: Tensor, layers: Sequence[Any]) -> Matrices:
    return Matrices(
        down.view(len(layers), *_down(layers[0]).shape),
        up.view(len(layers), *_up(layers[0]).shape),
    )


def _stack_frozen(layers: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
    """Move the frozen weights and biases of layers into one tensor each; the layers get views of them."""
    bases = [layer.base_layer for layer in layers]
    weight = _stack([base.weight for base in bases])
    return weight, None if bases[0].bias is None else _stack([base.bias for base in bases])


def _stack(parts: Sequence[nn.Parameter]) -> Tensor:
    """Move frozen tensors into one, along the first dimension, and make them views of it."""
    if len(parts) == 1:
        return parts[0].data
    stacked = torch.cat([part.data for part in parts])
    for part, view in zip(parts, torch.split(stacked, [len(part) for part in parts]), strict=True):
        part.data = view
    return stacked


def _down(layer: Any) -> nn.Parameter:
    parameter: nn.Parameter = layer.lora_A["default"].weight
    return parameter


def _up(layer: Any) -> nn.Parameter:
    parameter: nn.Parameter = layer.lora_B["default"].weight
    return parameter


def _magnitude(layer: Any) -> nn.Parameter:
    parameter: nn.Parameter = layer.lora_magnitude_vector["default"].weight
    return parameter


def _uses_dora(layer: Any) -> bool:
    return bool(layer.use_dora.get("default"))


def _dropout(layer: Any) -> float:
    return float(getattr(layer.lora_dropout["default"], "p", 0.0))
