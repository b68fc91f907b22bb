"""What the loop asks of gradients: of a lone rank (`local`), whole on all ranks (`buckets`), in slices (`sharding`)."""

from __future__ import annotations

import contextlib
from enum import IntEnum
from typing import ClassVar, Protocol

from torch import Tensor

from finetune_trainer.distributed.world import World

NUM_TIMESTEP_BUCKETS = 10
"""The losses of a step are told apart by the tenth of the schedule that their timesteps are in."""


class Signal(IntEnum):
    """Slots of the numbers that travel with the gradients; each is summed over the ranks."""

    LOSS = 0
    """Sum of the samples' losses."""
    SAMPLES = 1
    """Number of samples that the losses were summed over."""
    NOTICES = 2
    """Ranks that have been told to stop."""
    SAVE_DUE = 3
    """1 where the clock of rank 0 says that a checkpoint is due."""


class Gradients(Protocol):
    """The gradients of one step, and the step's few common numbers."""

    in_step: ClassVar[bool]
    """Whether a forward pass is a collective: then all ranks make as many of them."""
    signals: Tensor
    """The common numbers (len(Signal),): set before `reduce`, read after it."""
    by_timestep: Tensor
    """Sums and counts of the samples' losses by tenth of the schedule (2, NUM_TIMESTEP_BUCKETS), as the signals."""

    def clear(self) -> None:
        """Drop the last step's gradients, and set the signals to zero."""
        ...

    def passes(self) -> contextlib.AbstractContextManager[None]:
        """The block that makes forward and backward passes.

        Raises:
            FabricError: a peer was lost in it.
        """
        ...

    def reduce(self, world: World) -> None:
        """Sum gradients and signals over all ranks.

        Raises:
            FabricError: a peer was lost.
        """
        ...

    def norm(self) -> Tensor:
        """The common 2-norm of all gradients (scalar), once they are reduced."""
        ...

    def scale(self, factor: float) -> None:
        """Multiply all gradients, once they are reduced."""
        ...


def clip_factor(norm: float, max_norm: float) -> float:
    """What gradients of a finite norm are multiplied by so that it is at most `max_norm`; 0 leaves them as they are."""
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0
