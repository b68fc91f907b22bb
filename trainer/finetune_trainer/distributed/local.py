"""Gradients of a single rank: they stay where backward puts them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from finetune_trainer.distributed.gradients import NUM_TIMESTEP_BUCKETS, Signal
from finetune_trainer.distributed.world import World


class LocalGradients:
    """Gradients that no other rank needs; see `Gradients`. They take no memory between two steps."""

    forward_is_collective: ClassVar[bool] = False

    def __init__(self, parameters: Sequence[nn.Parameter], device: torch.device) -> None:
        self._parameters = list(parameters)
        self._gradients: list[Tensor] = []
        self.signals = torch.zeros(len(Signal), dtype=torch.float32, device=device)
        self.by_timestep = torch.zeros(2, NUM_TIMESTEP_BUCKETS, dtype=torch.float32, device=device)

    def clear(self) -> None:
        """Drop the gradients of the last step, and set the signals to zero."""
        self._gradients.clear()
        for parameter in self._parameters:
            parameter.grad = None
        self.signals.zero_()
        self.by_timestep.zero_()

    def passes(self) -> contextlib.AbstractContextManager[None]:
        """Return a block without collectives."""
        return contextlib.nullcontext()

    def drop_passes(self) -> None:
        """Drop the passes of this step, to repeat them."""
        self.clear()

    def expect_last_pass(self) -> None:
        """Do nothing. There is no other rank."""

    def reduce(self, world: World) -> None:
        """Set gradients that backward did not compute to zero, as with several ranks. There is nothing to sum."""
        assert world.size == 1
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self._gradients.append(parameter.grad)

    def norm(self) -> Tensor:
        """Return the 2-norm of all gradients."""
        return nn.utils.get_total_norm(self._gradients)

    def scale(self, factor: float) -> None:
        """Multiply all gradients."""
        for gradient in self._gradients:
            gradient.mul_(factor)
