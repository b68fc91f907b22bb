"""Trained weights that are stored in bf16 only. Their optimizer rounds stochastically (`optim.rounded_optimizer`).

The same weights as in `working_copy` have the low precision: those of linear layers and convolutions. All others stay
in fp32, and autocast chooses the format of each operation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import nn

from finetune_trainer.methods.working_copy import ParameterSlots


class RoundedWeights:
    """The low-precision weights of some modules; used like a `WorkingCopy`.

    Args:
        modules: the trained modules; their weights are converted.
        trained: their trained parameters.
        dtype: number format of the weights.
    """

    def __init__(self, modules: Sequence[nn.Module], trained: Collection[nn.Parameter], dtype: torch.dtype) -> None:
        self._slots = ParameterSlots(modules, trained)
        for parameter in self._slots.parameters:
            parameter.data = parameter.data.to(dtype)

    def leaf(self, parameter: nn.Parameter) -> nn.Parameter:
        """Return the parameter: backward computes its gradient."""
        return parameter

    def refresh(self) -> None:
        """Do nothing. There is no copy."""

    @contextlib.contextmanager
    def fp32_weights(self) -> Iterator[None]:
        """Within this block the modules hold the weights in fp32, as they are exported, in the host's memory."""
        exact = {
            parameter: nn.Parameter(parameter.detach().to("cpu", torch.float32)) for parameter in self._slots.parameters
        }
        self._slots.fill(exact)
        try:
            yield
        finally:
            self._slots.fill({parameter: parameter for parameter in exact})
