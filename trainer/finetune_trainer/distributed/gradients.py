"""What the loop asks of gradients, whoever holds them: whole on every rank (`buckets`) or in shards (`sharding`)."""

from __future__ import annotations

import contextlib
from enum import IntEnum
from typing import ClassVar, Protocol

from torch import Tensor

from finetune_trainer.distributed.world import World


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

    def clip(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their common 2-norm is at most `max_norm`; 0 leaves them as they are.

        Returns:
            The norm before the scaling (scalar).
        """
        ...
