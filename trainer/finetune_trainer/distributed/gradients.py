"""Interface of the gradients: of a single rank (`local`), complete on all ranks (`buckets`), in slices (`sharding`)."""

from __future__ import annotations

import contextlib
from enum import IntEnum
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from finetune_trainer.distributed.world import World

NUM_TIMESTEP_BUCKETS = 10
"""The losses of a step are grouped by the tenth of the schedule that contains their timestep."""


class Signal(IntEnum):
    """Values that are summed over the ranks together with the gradients."""

    LOSS = 0
    """Sum of the samples' losses."""
    SAMPLES = 1
    """Number of samples that the losses were summed over."""
    NOTICES = 2
    """Number of ranks that have a preemption notice."""
    SAVE_DUE = 3
    """1 if a checkpoint is due by the clock of rank 0."""


class Gradients(Protocol):
    """The gradients and signals of one step."""

    forward_is_collective: ClassVar[bool]
    """Whether a forward pass is a collective: then all ranks make the same number of them."""
    signals: Tensor
    """Values that are summed over the ranks (len(Signal),): set before `reduce`, read after it."""
    by_timestep: Tensor
    """Sums and counts of the samples' losses by tenth of the schedule (2, NUM_TIMESTEP_BUCKETS), like the signals."""

    def clear(self) -> None:
        """Drop the gradients of the last step, and set the signals to zero."""
        ...

    def hold(self) -> None:
        """Keep all gradients at fixed addresses from now on: a step sets them to zero, and passes add to them.

        Call it before a pass. Later calls do nothing. Captured passes need it.
        """
        ...

    def passes(self) -> contextlib.AbstractContextManager[None]:
        """Return the block in which the forward and backward passes run.

        Raises:
            FabricError: a peer was lost in the block.
        """
        ...

    def drop_passes(self) -> None:
        """Drop the passes of this step, to repeat them in smaller parts."""
        ...

    def expect_last_pass(self) -> None:
        """Prepare for the last backward pass of a step: its gradients may be exchanged while it runs."""
        ...

    def reduce(self, world: World) -> None:
        """Sum gradients and signals over all ranks.

        Raises:
            FabricError: a peer was lost.
        """
        ...

    def norm(self) -> Tensor:
        """Return the 2-norm of all gradients (scalar). Call it after `reduce`."""
        ...

    def scale(self, factor: float) -> None:
        """Multiply all gradients. Call it after `reduce`."""
        ...


def receives_fp32(parameter: Tensor, leaf: Tensor) -> bool:
    """Return whether backward can add the gradients of a parameter to an fp32 buffer itself.

    Otherwise they have the format of the leaf, and are converted when they are added.
    """
    return leaf is parameter and parameter.dtype is torch.float32


def clip_factor(norm: float, max_norm: float) -> float:
    """Return the factor that limits a finite gradient norm to `max_norm`; a `max_norm` of 0 disables clipping."""
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0
