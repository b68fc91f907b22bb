"""Low-rank adapters in flat storage, computed as few large operations; the mathematics is peft's.

A UNet of SDXL has 560 adapted layers with two small matrices each. One by one they are cast, multiplied and scaled in
14,000 launches a step, which takes a GPU's host longer than the GPU needs for the work. Here

- the fp32 weights of all adapters of a module are views into one tensor, and one copy of it per pass has the number
  format of the activations and the scale alpha / rank in it;
- layers with a common input are one group: their frozen weights and their adapters are multiplied together. These are
  queries, keys and values of a self-attention, and keys and values of a cross-attention;
- backward adds the gradients of all adapters into one tensor, which is converted to fp32 once per pass.

Called by `lora`. Layers with dropout, with DoRA or in compiled blocks use `lora_linear` or peft instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finetune_trainer.methods.adapted_attention import AdaptedAttentionProcessor, find_groups
from finetune_trainer.methods.lora_linear import fast_layers


class AdapterBank:
    """The adapters of one module.

    Args:
        groups: peft's linear layers; those of a group have the same input, rank and scale and equal shapes.
        dtype: number format of the activations.
    """

    def __init__(self, groups: Sequence[Sequence[Any]], dtype: torch.dtype) -> None:
        layers = [layer for group in groups for layer in group]
        parameters = [_down(layer) for layer in layers] + [_up(layer) for layer in layers]
        self._parameters = parameters
        self._sizes = [parameter.numel() for parameter in parameters]
        self._num_down = sum(self._sizes[: len(layers)])
        self._scale = float(layers[0].scaling["default"])
        self._master = torch.cat([parameter.data.flatten() for parameter in parameters])
        self._working = torch.empty_like(self._master, dtype=dtype)
        self._gradients = torch.zeros_like(self._working)
        self.anchor = self._working.new_empty(0)
        """Connects the adapted layers of a pass with the parameters in the graph."""
        for parameter, flat in zip(parameters, torch.split(self._master, self._sizes), strict=True):
            parameter.data = flat.view(parameter.shape)
        starts = [0]
        for size in self._sizes:
            starts.append(starts[-1] + size)
        self.groups = []
        first = 0
        for group in groups:
            last = first + len(group)
            down = slice(starts[first], starts[last])
            up = slice(starts[len(layers) + first], starts[len(layers) + last])
            self.groups.append(AdapterGroup(self, group, down, up))
            first = last

    @property
    def working(self) -> Tensor:
        """All matrices in the format of the activations (n,): first those that map down, then, scaled, the others."""
        return self._working

    @property
    def gradients(self) -> Tensor:
        """Gradients of the current backward pass, in the layout and format of `working`."""
        return self._gradients

    @property
    def scale(self) -> float:
        """Return alpha / rank."""
        return self._scale

    def start_pass(self, *_: object) -> None:
        """Copy the weights for a forward pass; a hook that the module calls before its forward."""
        self.anchor = _Pass.apply(self, *self._parameters)

    def refresh(self) -> None:
        """Copy the fp32 weights to `working`, and drop gradients of a pass that failed."""
        self._working[: self._num_down].copy_(self._master[: self._num_down])
        torch.mul(self._master[self._num_down :], self._scale, out=self._working[self._num_down :])
        self._gradients.zero_()

    def take_gradients(self) -> list[Tensor]:
        """Return the gradients of the pass in fp32, one for each parameter, and reset them."""
        taken = self._gradients.to(torch.float32, copy=True)
        self._gradients.zero_()
        views = torch.split(taken, self._sizes)
        return [view.view(parameter.shape) for view, parameter in zip(views, self._parameters, strict=True)]


def use_adapter_bank(module: nn.Module, dtype: torch.dtype) -> None:
    """Compute the adapted linear layers of a module from flat storage; layers with dropout or DoRA keep peft's forward.

    Args:
        module: a module whose layers have adapters. Its parameters have their final device and format.
        dtype: number format of the activations.
    """
    layers = fast_layers(module)
    if not layers:
        return
    grouped = {id(layer): layer for layer in layers}
    attentions, groups = [], []
    for attention, members in find_groups(module, lambda layer: id(layer) in grouped):
        attentions.append(attention)
        groups.append(members)
        for member in members:
            del grouped[id(member)]
    bank = AdapterBank([*groups, *([layer] for layer in grouped.values())], dtype)
    for attention, group in zip(attentions, bank.groups, strict=False):
        attention.set_processor(AdaptedAttentionProcessor(group, not attention.is_cross_attention))
    for layer, group in zip(grouped.values(), bank.groups[len(groups) :], strict=True):
        layer.forward = group.call_single
    module.register_forward_pre_hook(bank.start_pass)


class AdapterGroup:
    """Adapted layers with a common input.

    The frozen weights of the layers are moved into one tensor; those of the layers become views of it.

    Args:
        bank: stores the adapters.
        layers: peft's linear layers.
        down: the group's part of the flat storage with the matrices that map to the rank.
        up: its part with the matrices that map from the rank.
    """

    def __init__(self, bank: AdapterBank, layers: Sequence[Any], down: slice, up: slice) -> None:
        rank, num_in = _down(layers[0]).shape
        num_out = _up(layers[0]).shape[0]
        self.bank, self.size, self.num_out = bank, len(layers), num_out
        self.down = bank.working[down].view(self.size * rank, num_in)
        self.up = bank.working[up].view(self.size, num_out, rank)
        self.down_gradient = bank.gradients[down].view_as(self.down)
        self.up_gradient = bank.gradients[up].view_as(self.up)
        bases = [layer.base_layer for layer in layers]
        self.weight = _stack([base.weight for base in bases])
        self.bias = None if bases[0].bias is None else _stack([base.bias for base in bases])

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of the layers for a common input (..., in)."""
        outputs: tuple[Tensor, ...] = _AdaptedLinears.apply(x, self.bank.anchor, self)
        return outputs

    def call_single(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return the output of the only layer; with the signature of a layer's forward."""
        (output,) = self(x)
        return output


class _Pass(torch.autograd.Function):
    """Makes all parameters inputs of the graph of one pass; backward runs after that of all adapted layers."""

    @staticmethod
    def forward(ctx: Any, bank: AdapterBank, *_: Tensor) -> Tensor:
        bank.refresh()
        ctx.bank = bank
        ctx.set_materialize_grads(False)
        return bank.working.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *ctx.bank.take_gradients()


class _AdaptedLinears(torch.autograd.Function):
    """y_i = x W_i^T + b_i + s (x A_i^T) B_i^T for the layers i of a group (https://arxiv.org/abs/2106.09685, eq. 3).

    The gradients of A and B are added to the bank's; the anchor gets none.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, group: AdapterGroup) -> tuple[Tensor, ...]:
        del anchor
        rows = x.reshape(-1, x.shape[-1])
        hidden = rows @ group.down.t()
        y = nn.functional.linear(rows, group.weight, group.bias)
        if group.size == 1:
            y.addmm_(hidden, group.up[0].t())
        else:
            _by_layer(y, group.size).baddbmm_(_by_layer(hidden, group.size), group.up.transpose(1, 2))
        ctx.save_for_backward(rows, hidden)
        ctx.group, ctx.shape = group, x.shape
        return y.view(*x.shape[:-1], group.size, group.num_out).unbind(-2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (rows, hidden), group = ctx.saved_tensors, ctx.group
        parts = [gradient.reshape(-1, group.num_out) for gradient in gradients]
        if group.size == 1:
            (g,) = parts
            g_hidden = g @ group.up[0]
            group.up_gradient[0].addmm_(g.t(), hidden, alpha=group.bank.scale)
        else:
            g = torch.cat(parts, dim=1)
            by_layer = _by_layer(g, group.size)
            g_hidden = torch.empty_like(hidden)
            torch.bmm(by_layer, group.up, out=_by_layer(g_hidden, group.size))
            group.up_gradient.baddbmm_(by_layer.transpose(1, 2), _by_layer(hidden, group.size), alpha=group.bank.scale)
        group.down_gradient.addmm_(g_hidden.t(), rows)
        g_x = None
        if ctx.needs_input_grad[0]:
            g_x = (g @ group.weight).addmm_(g_hidden, group.down).view(ctx.shape)
        return g_x, None, None


def _by_layer(rows: Tensor, size: int) -> Tensor:
    """View rows with the values of all layers (n, size * m) as matrices of each layer (size, n, m)."""
    return rows.view(len(rows), size, -1).transpose(0, 1)


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
