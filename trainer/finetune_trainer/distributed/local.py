"""Gradients of a single rank: they stay where backward puts them, in fp32."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from finetune_trainer.distributed.gradients import NUM_TIMESTEP_BUCKETS, Signal, receives_fp32
from finetune_trainer.distributed.world import World


class LocalGradients:
    """Gradients that no other rank needs; see `Gradients`. They take no memory between two steps unless held.

    Args:
        parameters: the trained parameters.
        device: device of the signals.
        leaves: the tensors that backward computes gradients of, one for each parameter; see `Method.leaves`.
    """

    forward_is_collective: ClassVar[bool] = False

    def __init__(
        self, parameters: Sequence[nn.Parameter], device: torch.device, leaves: Sequence[nn.Parameter] | None = None
    ) -> None:
        self._parameters = list(parameters)
        self._held: Tensor | None = None
        self._views: list[Tensor] = []
        self._copies: list[nn.Parameter] = []
        """Leaves whose gradients are moved to those of their parameter right after backward has computed them."""
        for index, leaf in enumerate(self._parameters if leaves is None else leaves):
            if not receives_fp32(self._parameters[index], leaf):
                self._copies.append(leaf)
                move = functools.partial(self._move, index)
                leaf.register_post_accumulate_grad_hook(move)  # type: ignore[no-untyped-call]
        self._gradients: list[Tensor] = []
        self.signals = torch.zeros(len(Signal), dtype=torch.float32, device=device)
        self.by_timestep = torch.zeros(2, NUM_TIMESTEP_BUCKETS, dtype=torch.float32, device=device)

    def clear(self) -> None:
        """Drop the gradients of the last step, and set the signals to zero."""
        self._gradients.clear()
        for leaf in self._copies:
            leaf.grad = None
        if self._held is None:
            for parameter in self._parameters:
                parameter.grad = None
        else:
            self._held.zero_()
        self.signals.zero_()
        self.by_timestep.zero_()

    def hold(self) -> None:
        """Keep all gradients in one flat buffer."""
        if self._held is not None:
            return
        sizes = [parameter.numel() for parameter in self._parameters]
        self._held = torch.zeros(sum(sizes), dtype=torch.float32, device=self.signals.device)
        for parameter, flat in zip(self._parameters, torch.split(self._held, sizes), strict=True):
            view = flat.view(parameter.shape)
            self._views.append(view)
            if parameter.dtype is view.dtype:
                if parameter.grad is not None:
                    view.copy_(parameter.grad)
                parameter.grad = view

    def views(self) -> list[Tensor]:
        """Return the gradients of all parameters, in their order; see `Gradients`."""
        return list(self._views)

    def _move(self, index: int, leaf: Tensor) -> None:
        """Add the gradient of a leaf to that of its parameter."""
        assert leaf.grad is not None
        parameter = self._parameters[index]
        if self._views:
            self._views[index].add_(leaf.grad)
        elif parameter.grad is None:
            parameter.grad = torch.empty_like(parameter).copy_(leaf.grad)
        else:
            parameter.grad.add_(leaf.grad)
        leaf.grad = None

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
        if self._held is not None:
            self._gradients = [self._held]
            return
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
