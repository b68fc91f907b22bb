"""The training loop: the same for every method, data set and number of ranks."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from finetune_contract.beat import RankState
from finetune_contract.run_spec import RunSpec
from finetune_trainer.data.batches import BatchMaker
from finetune_trainer.data.draws import Draws, Purpose
from finetune_trainer.data.order import SampleRef, micro_batches, rank_share, sample_at
from finetune_trainer.distributed.buckets import GradientBuckets, Signal
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import ConfigError
from finetune_trainer.methods.method import Method
from finetune_trainer.train.notice import Notice
from finetune_trainer.train.optimizer import LearningRate, set_learning_rate
from finetune_trainer.train.report import Reporter
from finetune_trainer.train.saving import Checkpointer
from finetune_trainer.train.state import TrainState

SPEED_STEPS = 20
"""Images per second are measured over so many steps."""


@dataclass(frozen=True)
class StepResult:
    """What all ranks agree on after a step.

    Attributes:
        loss: mean over the global batch.
        stop: some rank has been told to stop.
        save: a checkpoint is due.
    """

    loss: float
    stop: bool
    save: bool


@dataclass(frozen=True)
class Loop:
    """Trains from the step that the state is at.

    Attributes:
        validate: called after every finished step with nothing unsaved, where `validation_due` says so.
    """

    spec: RunSpec
    world: World
    method: Method
    batches: BatchMaker
    draws: Draws
    state: TrainState
    buckets: GradientBuckets
    learning_rate: LearningRate
    checkpointer: Checkpointer
    notice: Notice
    reporter: Reporter
    validate: Callable[[int], None]
    num_samples: int
    total_steps: int

    def run(self) -> bool:
        """Train until all steps are done or a notice comes; either way the last step is committed.

        Returns:
            Whether all steps are done.

        Raises:
            RankError: training cannot go on.
        """
        finished_at = deque([time.monotonic()], maxlen=SPEED_STEPS + 1)
        self.reporter.begin(self.state.step, self.total_steps)
        while self.state.step < self.total_steps:
            # Saving has its own state; this is where training goes on after it.
            self.reporter.state(RankState.TRAINING)
            result = self.train_step()
            finished_at.append(time.monotonic())
            self.reporter.progress(self.state.step, self.state.mean_loss, self._speed(finished_at))
            if result.stop:
                self.checkpointer.save_and_wait(self.state)
                return self.state.step == self.total_steps
            validation_due = self._validation_due()
            if result.save or validation_due:
                self.checkpointer.save(self.state)
            if validation_due:
                self._validate()
                finished_at.clear()
                finished_at.append(time.monotonic())
        self.checkpointer.save_and_wait(self.state)
        return True

    def train_step(self) -> StepResult:
        """One optimizer step over one global batch.

        Raises:
            ConfigError: loss or gradients are no longer finite; the parameters are as before.
            FabricError: a peer was lost.
        """
        step = self.state.step
        self.buckets.clear()
        self._accumulate(step)
        self.buckets.signals[Signal.NOTICES] = float(self.notice.given)
        self.buckets.signals[Signal.SAVE_DUE] = float(self.checkpointer.due(step + 1))
        self.buckets.reduce(self.world)
        norm = self.buckets.clip(self.spec.training.max_grad_norm)
        # The one place in a step where the host waits for the device.
        loss_sum, num_samples, notices, save_due, norm_value = torch.cat([self.buckets.signals, norm.view(1)]).tolist()
        loss = loss_sum / num_samples
        if not (math.isfinite(loss) and math.isfinite(norm_value)):
            raise ConfigError(
                f"training.learningRate: loss {loss} and gradient norm {norm_value} in step {step} are not finite; "
                "use a lower learning rate, or precision fp32"
            )
        set_learning_rate(self.state.optimizer, self.learning_rate(step))
        self.state.optimizer.step()
        self.state.step = step + 1
        self.state.losses.append(loss)
        if self.state.ema is not None:
            self.state.ema.update(step + 1)
        return StepResult(loss, notices > 0, save_due > 0)

    def _accumulate(self, step: int) -> None:
        """Add the gradients of this rank's share of the global batch; every sample counts 1 / global batch."""
        seed, global_batch = self.spec.training.seed, self.spec.global_batch
        positions = rank_share(step, global_batch, self.world.rank, self.world.size)
        for part in micro_batches(positions, self.spec.training.batch_size):
            batch = self.batches.make([sample_at(seed, self.num_samples, position) for position in part])
            torch.manual_seed(self.draws.torch_seed(Purpose.DROPOUT, SampleRef(step, part.start)))
            loss = self.method.losses(batch).sum()
            torch.autograd.backward(loss / global_batch)
            self.buckets.signals[Signal.LOSS] += loss.detach()
            self.buckets.signals[Signal.SAMPLES] += len(part)

    def _validation_due(self) -> bool:
        validation = self.spec.training.validation
        steps = validation.steps if validation is not None else None
        return steps is not None and self.state.step % steps == 0 and self.state.step < self.total_steps

    def _validate(self) -> None:
        # The step is committed: a notice need not wait for the pictures.
        self.world.barrier()
        with self.notice.released():
            self.validate(self.state.step)

    def _speed(self, finished_at: deque[float]) -> float | None:
        """Images per second of the whole world over the last steps."""
        seconds = finished_at[-1] - finished_at[0]
        return self.spec.global_batch * (len(finished_at) - 1) / seconds if seconds > 0 else None
