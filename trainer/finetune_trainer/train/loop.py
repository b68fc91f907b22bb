"""The training loop: the same for every method, data set and number of ranks."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from dataclasses import dataclass

import torch

from finetune_contract.beat import RankState
from finetune_contract.run_spec import RunSpec
from finetune_trainer.data.batches import BatchMaker
from finetune_trainer.data.draws import Draws, Purpose
from finetune_trainer.data.order import SampleRef, micro_batches, most_micro_batches, rank_share, sample_at
from finetune_trainer.distributed.gradients import Gradients, Signal
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import ConfigError
from finetune_trainer.methods.method import Method
from finetune_trainer.train.notice import Notice
from finetune_trainer.train.optimizer import LearningRate, set_learning_rate
from finetune_trainer.train.report import Reporter
from finetune_trainer.train.saving import Checkpointer
from finetune_trainer.train.state import TrainState
from finetune_trainer.train.validation import Validator

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
    """Trains from the step that the state is at."""

    spec: RunSpec
    world: World
    method: Method
    batches: BatchMaker
    draws: Draws
    state: TrainState
    buckets: Gradients
    learning_rate: LearningRate
    checkpointer: Checkpointer
    notice: Notice
    reporter: Reporter
    validator: Validator | None
    total_steps: int

    def run(self) -> bool:
        """Train until all steps are done or a notice comes; either way the last step is committed.

        Returns:
            Whether all steps are done.

        Raises:
            RankError: training cannot go on.
        """
        step_seconds: deque[float] = deque(maxlen=SPEED_STEPS)
        self.reporter.begin(self.state.step, self.total_steps)
        self._look_if_due()
        while self.state.step < self.total_steps:
            # Saving and validating have states of their own; this is where training goes on after them.
            self.reporter.state(RankState.TRAINING)
            began = time.monotonic()
            result = self.train_step()
            step_seconds.append(time.monotonic() - began)
            self.reporter.progress(self.state.step, self.state.mean_loss, self._speed(step_seconds))
            is_last = self.state.step == self.total_steps
            if is_last or result.stop:
                self.checkpointer.save_and_wait(self.state)
            elif result.save:
                self.checkpointer.save(self.state)
            if result.stop and not is_last:
                return False
            self._look_if_due()
        return True

    def train_step(self) -> StepResult:
        """One optimizer step over one global batch.

        Raises:
            ConfigError: loss or gradients are no longer finite; the parameters are as before.
            FabricError: a peer was lost.
        """
        step = self.state.step
        self.buckets.clear()
        with self.buckets.passes():
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
        self.checkpointer.before_update()
        with self.state.updating():
            set_learning_rate(self.state.optimizer, self.learning_rate(step))
            self.state.optimizer.step()
            self.state.step = step + 1
            self.state.losses.append(loss)
            if self.state.ema is not None:
                self.state.ema.update(step + 1)
            self.checkpointer.updated()
        return StepResult(loss, notices > 0, save_due > 0)

    def _accumulate(self, step: int) -> None:
        """Add the gradients of this rank's share of the global batch; every sample counts 1 / global batch."""
        seed, global_batch = self.spec.training.seed, self.spec.global_batch
        positions = rank_share(step, global_batch, self.world.rank, self.world.size)
        parts = list(micro_batches(positions, self.spec.training.batch_size))
        for part in parts:
            batch = self.batches.make([sample_at(seed, len(self.batches.source), position) for position in part])
            torch.manual_seed(self.draws.torch_seed(Purpose.DROPOUT, SampleRef(step, part.start)))
            loss = self.method.losses(batch).sum()
            torch.autograd.backward(loss / global_batch)
            self.buckets.signals[Signal.LOSS] += loss.detach()
            self.buckets.signals[Signal.SAMPLES] += len(part)
        if self.buckets.in_step and len(parts) < most_micro_batches(
            global_batch, self.world.size, self.spec.training.batch_size
        ):
            self._keep_in_step(step)

    def _keep_in_step(self, step: int) -> None:
        """A forward and a backward pass that count for nothing: the other ranks have one sample more."""
        batch = self.batches.make([sample_at(self.spec.training.seed, len(self.batches.source), step)])
        torch.autograd.backward(self.method.losses(batch).sum() * 0)

    def _look_due(self) -> bool:
        return self.validator is not None and self.validator.due(self.state.step)

    def _look_if_due(self) -> None:
        """Validate the state unless an earlier attempt has. It is committed first."""
        if self.validator is None or not self._look_due() or self.validator.is_noted(self.state.step):
            return
        is_saved = self.checkpointer.try_to_save(self.state)
        self.reporter.state(RankState.VALIDATING)
        # Where nothing is unsaved a notice need not wait for the pictures.
        with self.notice.released() if is_saved else contextlib.nullcontext(), self.state.averaged():
            self.validator.look(self.state.step)

    def _speed(self, step_seconds: deque[float]) -> float:
        """Images per second of the whole world over the last steps."""
        return self.spec.global_batch * len(step_seconds) / sum(step_seconds)
