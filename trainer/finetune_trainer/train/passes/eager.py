"""A forward and backward pass of a micro-batch, launched operation by operation. Used by the loop and by `graphed`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from finetune_trainer.data.batches import Batch
from finetune_trainer.distributed.gradients import NUM_TIMESTEP_BUCKETS, Gradients, Signal
from finetune_trainer.methods.method import Method
from finetune_trainer.train.passes.choice import GraphChoice


class Passes(Protocol):
    """Computes the passes of a step."""

    @property
    def choice(self) -> GraphChoice:
        """Whether passes are replayed as CUDA graphs, and why not."""
        ...

    def run(self, batch: Batch, seed: int, loss_scale: float, is_last: bool) -> None:
        """Add the gradients, losses and counts of a micro-batch to those of the step.

        Args:
            batch: the micro-batch.
            seed: seed of torch's random numbers, e.g. of dropout.
            loss_scale: factor of the loss in fp16, else 1.
            is_last: whether it is the last pass of this rank in the step.
        """
        ...

    def release(self, cause: str) -> bool:
        """Free memory that is held between passes, and hold none in future.

        Args:
            cause: why, for the log.

        Returns:
            Whether any was held.
        """
        ...

    def make_room(self) -> None:
        """Free memory that is held between passes if other models need it now."""
        ...


@dataclass(frozen=True)
class PassWork:
    """The computation of one pass, on the device only: it neither reads a value on the host nor depends on one.

    Attributes:
        method: the method that is trained.
        gradients: gradients and signals of the step.
        global_batch: number of samples of a step.
        num_timesteps: number of timesteps of the noise schedule.
    """

    method: Method
    gradients: Gradients
    global_batch: int
    num_timesteps: int

    def run(self, batch: Batch, loss_scale: float | Tensor) -> None:
        """Add the gradients and the signals of a batch that `Method.prepare` returned."""
        losses = self.method.losses(batch)
        loss = losses.sum()
        torch.autograd.backward(loss * loss_scale / self.global_batch)
        signals = self.gradients.signals
        signals[Signal.LOSS] += loss.detach()
        signals[Signal.SAMPLES] += len(batch.timesteps) - batch.num_prior
        self._add_losses_by_timestep(batch.timesteps, losses.detach())

    def _add_losses_by_timestep(self, timesteps: Tensor, losses: Tensor) -> None:
        tenths = timesteps * NUM_TIMESTEP_BUCKETS // self.num_timesteps
        self.gradients.by_timestep[0].index_add_(0, tenths, losses)
        self.gradients.by_timestep[1].index_add_(0, tenths, torch.ones_like(losses))


@dataclass(frozen=True)
class EagerPasses:
    """Computes each pass when it is due; see `Passes`."""

    work: PassWork
    choice: GraphChoice = field(default_factory=lambda: GraphChoice(False))

    def run(self, batch: Batch, seed: int, loss_scale: float, is_last: bool) -> None:
        """Compute a pass."""
        self.work.method.seed(seed)
        if is_last:
            self.work.gradients.expect_last_pass()
        self.work.run(self.work.method.prepare(batch), loss_scale)

    def release(self, cause: str) -> bool:
        """Free nothing: autograd frees the memory of a pass at its end."""
        del cause
        return False

    def make_room(self) -> None:
        """Free nothing."""
