"""A copy of trained weights in the number format of the forward pass, next to the fp32 weights that are trained.

Autocast casts every fp32 weight in every pass. Here the layers hold low-precision weights, which are copied from the
fp32 weights once per step. Autocast still chooses the format of each operation, and finds these weights in the right
one, so all results have the same bits as without the copy.

The copied weights are those of linear layers and convolutions, which autocast computes in the low precision. All other
weights (of normalizations, embeddings, ...) stay in fp32: the layers use the trained weights themselves.

The optimizer, the average of the weights, checkpoints and exports use the fp32 weights only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

_LAYERS = (nn.Linear, _ConvNd)
"""Layers that autocast computes in the low precision, with all their weights."""


class ParameterSlots:
    """The attributes of modules that hold the parameters of linear layers and convolutions.

    Args:
        modules: the trained modules.
        trained: their trained parameters; others are left alone.
    """

    def __init__(self, modules: Sequence[nn.Module], trained: Collection[nn.Parameter]) -> None:
        slots: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in modules:
            for owner in module.modules():
                for name, parameter in owner.named_parameters(recurse=False):
                    slots.setdefault(id(parameter), []).append((owner, name))
        low = low_precision_parameters(modules)
        # Layers that share a parameter continue to share it.
        self._slots = {parameter: slots[id(parameter)] for parameter in trained if id(parameter) in low}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters, in the order in which they are trained."""
        return list(self._slots)

    def fill(self, used: Mapping[nn.Parameter, nn.Parameter]) -> None:
        """Replace the parameters in the modules."""
        for parameter, slots in self._slots.items():
            for owner, name in slots:
                owner._parameters[name] = used[parameter]


class WorkingCopy:
    """The low-precision weights of some modules.

    Args:
        modules: the trained modules; their layers then hold the copies.
        trained: their trained parameters, fp32.
        dtype: number format of the copies.
    """

    def __init__(self, modules: Sequence[nn.Module], trained: Collection[nn.Parameter], dtype: torch.dtype) -> None:
        self._slots = ParameterSlots(modules, trained)
        self._copies = {parameter: _copy_of(parameter, dtype) for parameter in self._slots.parameters}
        self._slots.fill(self._copies)

    def leaf(self, parameter: nn.Parameter) -> nn.Parameter:
        """Return the tensor that receives the gradients of a trained parameter."""
        return self._copies.get(parameter, parameter)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy all weights after they have changed, in place and in few launches."""
        pairs = [(copy.detach(), parameter.detach()) for parameter, copy in self._copies.items()]
        # GPUs copy tensors together only if they have the same layout.
        alike = [(copy, parameter) for copy, parameter in pairs if copy.stride() == parameter.stride()]
        if alike:
            torch._foreach_copy_([copy for copy, _ in alike], [parameter for _, parameter in alike])
        for copy, parameter in pairs:
            if copy.stride() != parameter.stride():
                copy.copy_(parameter)

    @contextlib.contextmanager
    def fp32_weights(self) -> Iterator[None]:
        """Within this block the modules hold the fp32 weights, as they are exported."""
        self._slots.fill({parameter: parameter for parameter in self._copies})
        try:
            yield
        finally:
            self._slots.fill(self._copies)


def low_precision_parameters(modules: Sequence[nn.Module]) -> set[int]:
    """Return the ids of the parameters that are used by linear layers and convolutions only."""
    low: set[int] = set()
    others: set[int] = set()
    for module in modules:
        for owner in module.modules():
            found = low if isinstance(owner, _LAYERS) else others
            found |= {id(parameter) for parameter in owner.parameters(recurse=False)}
    return low - others


def _copy_of(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    """Return a parameter in another number format.

    On GPUs the weights of convolutions are channels last, as their inputs are: they would be converted in each pass.
    """
    copy = parameter.detach().to(dtype)
    if copy.dim() == 4 and copy.device.type != "cpu":
        copy = copy.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(copy)
