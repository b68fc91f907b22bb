"""The training loop: the same for every method, data set and number of ranks."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune_contract.heartbeat import RankState
from finetune_contract.run_spec import RunSpec
from finetune_trainer.checkpoint.checkpointer import Checkpointer
from finetune_trainer.checkpoint.state import TrainState
from finetune_trainer.data.prefetch import Prefetcher
from finetune_trainer.data.sampling.draws import Draws, Purpose
from finetune_trainer.data.sampling.order import SampleRef, most_micro_batches, rank_share, sample_at
from finetune_trainer.distributed.gradients import NUM_TIMESTEP_BUCKETS, Gradients, Signal, clip_factor
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import ConfigError
from finetune_trainer.methods.method import Method
from finetune_trainer.optim.optimizer import LearningRate, set_learning_rate
from finetune_trainer.report import Reporter
from finetune_trainer.train.metrics_logger import MetricsLogger
from finetune_trainer.train.micro_batch import MicroBatch, is_out_of_memory
from finetune_trainer.train.preemption_notice import PreemptionNotice
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
        by_timestep: sums and counts of the samples' losses by tenth of the schedule.
    """

    loss: float
    stop: bool
    save: bool
    by_timestep: tuple[list[float], list[float]]


@dataclass(frozen=True)
class Loop:
    """Trains from the step that the state is at."""

    spec: RunSpec
    world: World
    method: Method
    batches: Prefetcher
    draws: Draws
    state: TrainState
    buckets: Gradients
    learning_rate: LearningRate
    checkpointer: Checkpointer
    notice: PreemptionNotice
    reporter: Reporter
    validator: Validator | None
    total_steps: int
    micro_batch: MicroBatch
    num_timesteps: int
    journal: MetricsLogger | None = None

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
            self._tell(result, self._speed(step_seconds))
            is_last = self.state.step == self.total_steps
            if is_last or result.stop:
                self.checkpointer.save_and_wait(self.state)
            elif result.save:
                self.checkpointer.save(self.state)
            if result.stop and not is_last:
                return False
            self._look_if_due()
        return True

    def _tell(self, result: StepResult, images_per_second: float) -> None:
        step = self.state.step
        self.reporter.progress(step, self.state.mean_loss, images_per_second)
        if self.journal is not None:
            rate = self.learning_rate(step - 1)
            values = {"loss": result.loss, "learning rate": rate, "images per second": images_per_second}
            self.journal.step(step, values, *result.by_timestep)

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
        norm = self.buckets.norm() / self._loss_scale
        # The one place in a step where the host waits for the device.
        common = torch.cat([self.buckets.signals, norm.view(1), self.buckets.by_timestep.flatten()]).tolist()
        (loss_sum, num_samples, notices, save_due, norm_value), tenths = common[:5], common[5:]
        loss = loss_sum / num_samples
        overflowed = self.state.loss_scale is not None and math.isfinite(loss) and not math.isfinite(norm_value)
        if not overflowed and not (math.isfinite(loss) and math.isfinite(norm_value)):
            raise ConfigError(
                f"training.learningRate: loss {loss} and gradient norm {norm_value} in step {step} are not finite; "
                "use a lower learning rate, or precision fp32"
            )
        self.checkpointer.before_update()
        with self.state.updating():
            set_learning_rate(self.state.optimizer, self.learning_rate(step))
            if not overflowed:
                self._move(norm_value)
            self._rescale(overflowed)
            self.state.step = step + 1
            self.state.losses.append(loss)
            if self.state.ema is not None:
                self.state.ema.update(step + 1)
            self.checkpointer.updated()
        return StepResult(
            loss, notices > 0, save_due > 0, (tenths[:NUM_TIMESTEP_BUCKETS], tenths[NUM_TIMESTEP_BUCKETS:])
        )

    @property
    def _loss_scale(self) -> float:
        return 1.0 if self.state.loss_scale is None else self.state.loss_scale.value

    def _move(self, norm: float) -> None:
        """Let the optimizer take its step along the true gradients, clipped; most often they are that already."""
        factor = clip_factor(norm, self.spec.training.max_grad_norm) / self._loss_scale
        if factor != 1.0:
            self.buckets.scale(factor)
        self.state.optimizer.step()

    def _rescale(self, overflowed: bool) -> None:
        """Take a lower loss scale where fp16 could not hold the gradients, and perhaps a higher one where it could.

        Raises:
            ConfigError: it never can.
        """
        if self.state.loss_scale is not None:
            (self.state.loss_scale.overflowed if overflowed else self.state.loss_scale.held)()

    def _accumulate(self, step: int) -> None:
        """Add the gradients of this rank's share of the global batch; every sample counts 1 / global batch.

        Raises:
            ConfigError: memory runs out with one sample.
        """
        positions = rank_share(step, self.spec.global_batch, self.world.rank, self.world.size)
        while not self._fits(step, positions):
            self.micro_batch.halve(len(positions))
            self.buckets.clear()
        size = self.micro_batch.size
        most = most_micro_batches(self.spec.global_batch, self.world.size, size)
        if self.buckets.in_step and math.ceil(len(positions) / size) < most:
            self._keep_in_step(step)

    def _keep_in_step(self, step: int) -> None:
        """A forward and a backward pass that count for nothing: the other ranks have one sample more."""
        batch = self.batches.take(self._refs(range(step, step + 1)), [])
        torch.autograd.backward(self.method.losses(batch).sum() * 0)

    def _fits(self, step: int, positions: range) -> bool:
        """Add the gradients of these positions; False, with some of them added, where memory ran out.

        Raises:
            ConfigError: memory ran out, and the step cannot be begun again.
        """
        parts = self.batches.split(self._refs(positions), self.micro_batch.size)
        next_step = rank_share(step + 1, self.spec.global_batch, self.world.rank, self.world.size)
        following = next(iter(self.batches.split(self._refs(next_step), self.micro_batch.size)), [])
        first = positions.start
        try:
            for part, then in zip(parts, [*parts[1:], following], strict=False):
                batch = self.batches.take(part, then)
                torch.manual_seed(self.draws.torch_seed(Purpose.DROPOUT, SampleRef(step, first)))
                first += len(part)
                losses = self.method.losses(batch)
                loss = losses.sum()
                torch.autograd.backward(loss * self._loss_scale / self.spec.global_batch)
                self.buckets.signals[Signal.LOSS] += loss.detach()
                self.buckets.signals[Signal.SAMPLES] += len(part)
                self._note_by_timestep(batch.timesteps, losses.detach())
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if self.buckets.in_step:
                # Where a pass is a collective, no rank can begin it again by itself.
                raise self.micro_batch.too_large(len(positions)) from error
            return False
        return True

    def _note_by_timestep(self, timesteps: Tensor, losses: Tensor) -> None:
        tenths = timesteps * NUM_TIMESTEP_BUCKETS // self.num_timesteps
        self.buckets.by_timestep[0].index_add_(0, tenths, losses)
        self.buckets.by_timestep[1].index_add_(0, tenths, torch.ones_like(losses))

    def _refs(self, positions: range) -> list[SampleRef]:
        seed, num_samples = self.spec.training.seed, len(self.batches.source)
        return [sample_at(seed, num_samples, position) for position in positions]

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
