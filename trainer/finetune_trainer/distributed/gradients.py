"""What the loop asks of gradients, whoever holds them: whole on every rank (`buckets`) or in shards (`sharding`)."""

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
        """Set gradients and signals to zero for the next step."""
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

    def clip(self, max_norm: float, loss_scale: float = 1.0) -> Tensor:
        """Scale all gradients so that their common 2-norm is at most `max_norm`; 0 leaves them as they are.

        Args:
            max_norm: the largest norm.
            loss_scale: what the loss was multiplied by, which is taken out first.

        Returns:
            The norm of the true gradients before the scaling (scalar).
        """
        ...
