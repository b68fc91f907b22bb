"""Gradients in flat buffers of a fixed layout, summed over the ranks together with the step's signals.

The layout depends only on the order and the sizes of the parameters. It is the same in every attempt, so the order in
which floats are added does not depend on the step at which a run began (torch's DDP rebuilds its buckets after the
first step).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from finetune_trainer.distributed.gradients import NUM_TIMESTEP_BUCKETS, Signal
from finetune_trainer.distributed.world import World

BUCKET_NUMEL = 16 * 1024 * 1024
"""Elements of a bucket (64 MiB): large enough that the latency of a collective is negligible."""
_NUM_EXTRA = len(Signal) + 2 * NUM_TIMESTEP_BUCKETS
"""Elements after the gradients in the last buffer."""


class GradientBuckets:
    """The gradients of the trained parameters as views into flat fp32 buffers; see `Gradients`.

    Each gradient is moved into its buffer as soon as backward has computed it, so the memory never holds all of them
    twice. The first one of a step is copied, which saves setting the buffer to zero. The last buffer ends with the
    losses by timestep and one slot for each Signal: the ranks agree on a loss, or to stop, without another collective.
    """

    forward_is_collective: ClassVar[bool] = False

    def __init__(self, parameters: Sequence[nn.Parameter], device: torch.device) -> None:
        groups = assign_buckets([parameter.numel() for parameter in parameters], BUCKET_NUMEL)
        self._buffers: list[Tensor] = []
        self._views: dict[nn.Parameter, Tensor] = {}
        self._filled: set[nn.Parameter] = set()
        for group in groups:
            members = [parameters[index] for index in group]
            is_last = group is groups[-1]
            size = sum(p.numel() for p in members) + (_NUM_EXTRA if is_last else 0)
            buffer = torch.zeros(size, dtype=torch.float32, device=device)
            offset = 0
            for parameter in members:
                self._views[parameter] = buffer[offset : offset + parameter.numel()].view_as(parameter)
                offset += parameter.numel()
            self._buffers.append(buffer)
        self.signals = self._buffers[-1][-len(Signal) :]
        """Values that are summed over the ranks (len(Signal),): set before `reduce`, read after it."""
        self.by_timestep = self._buffers[-1][-_NUM_EXTRA : -len(Signal)].view(2, NUM_TIMESTEP_BUCKETS)
        """Sums and counts of the samples' losses by tenth of the schedule; used like the signals."""

        for parameter in self._views:
            parameter.register_post_accumulate_grad_hook(self._move_gradient)  # type: ignore[no-untyped-call]
        self.clear()

    def clear(self) -> None:
        """Drop the gradients of the last step, and set the signals to zero."""
        self._filled.clear()
        self._buffers[-1][-_NUM_EXTRA:].zero_()
        for parameter in self._views:
            parameter.grad = None

    def _move_gradient(self, parameter: Tensor) -> None:
        """Move a gradient into its buffer, right after backward has computed it."""
        assert isinstance(parameter, nn.Parameter)
        assert parameter.grad is not None
        view = self._views[parameter]
        if parameter in self._filled:
            view.add_(parameter.grad)
        else:
            view.copy_(parameter.grad)
            self._filled.add(parameter)
        parameter.grad = None

    def passes(self) -> contextlib.AbstractContextManager[None]:
        """Return a block without collectives."""
        return contextlib.nullcontext()

    def reduce(self, world: World) -> None:
        """Sum gradients and signals over all ranks.

        Raises:
            FabricError: a peer was lost.
        """
        for parameter, view in self._views.items():
            if parameter not in self._filled:
                # Backward did not reach it.
                view.zero_()
            parameter.grad = view
        for buffer in self._buffers:
            world.sum(buffer)

    def norm(self) -> Tensor:
        """Return the 2-norm of all gradients."""
        norms = [torch.linalg.vector_norm(part) for part in self._gradients()]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm

    def scale(self, factor: float) -> None:
        """Multiply all gradients."""
        for part in self._gradients():
            part.mul_(factor)

    def _gradients(self) -> list[Tensor]:
        return [*self._buffers[:-1], self._buffers[-1][:-_NUM_EXTRA]]


def assign_buckets(sizes: Sequence[int], bucket_numel: int) -> list[list[int]]:
    """Group parameters, in order, into buckets of at most `bucket_numel` elements; a larger parameter gets its own.

    Args:
        sizes: elements of each parameter; at least one parameter.
        bucket_numel: elements of a bucket.

    Returns:
        Indices of the parameters of each bucket.
    """
    groups: list[list[int]] = [[]]
    filled = 0
    for index, size in enumerate(sizes):
        if groups[-1] and filled + size > bucket_numel:
            groups.append([])
            filled = 0
        groups[-1].append(index)
        filled += size
    return groups
