"""The training loop: the same for every method, data set and number of ranks. Built by `build`, run by `run`."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from dataclasses import dataclass, field

import torch

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
from finetune_trainer.performance.meter import Part, StepMeter
from finetune_trainer.phases import Phases, StartPhase
from finetune_trainer.report import Reporter
from finetune_trainer.train.metrics_logger import MetricsLogger
from finetune_trainer.train.micro_batch import MicroBatch, is_out_of_memory
from finetune_trainer.train.passes.eager import Passes
from finetune_trainer.train.preemption_notice import PreemptionNotice
from finetune_trainer.train.validation import Validator

SPEED_STEPS = 20
"""Number of steps that images per second are averaged over."""


@dataclass(frozen=True)
class StepResult:
    """The result of a step, the same on all ranks.

    Attributes:
        loss: mean loss over the global batch.
        stop: whether a rank has received the preemption notice.
        save: whether a checkpoint is due.
        by_timestep: sums and counts of the samples' losses, by tenth of the schedule.
    """

    loss: float
    stop: bool
    save: bool
    by_timestep: tuple[list[float], list[float]]


@dataclass(frozen=True)
class Loop:
    """Trains from the state's current step."""

    spec: RunSpec
    world: World
    method: Method
    batches: Prefetcher
    draws: Draws
    state: TrainState
    gradients: Gradients
    learning_rate: LearningRate
    checkpointer: Checkpointer
    notice: PreemptionNotice
    reporter: Reporter
    validator: Validator | None
    total_steps: int
    micro_batch: MicroBatch
    passes: Passes
    metrics: MetricsLogger | None = None
    phases: Phases = field(default_factory=Phases)
    meter: StepMeter = field(default_factory=StepMeter)

    def run(self) -> bool:
        """Train until all steps are done or a preemption notice arrives. In both cases the last step is committed.

        Returns:
            Whether all steps are done.

        Raises:
            RankError: training cannot continue.
        """
        step_seconds: deque[float] = deque(maxlen=SPEED_STEPS)
        self.reporter.begin(self.state.step, self.total_steps)
        self._validate_if_due()
        while self.state.step < self.total_steps:
            # Saving and validating set other states; training resumes here after them.
            self.reporter.state(RankState.TRAINING)
            began = time.monotonic()
            self.meter.begin()
            result = self.train_step()
            step_seconds.append(time.monotonic() - began)
            self._report_step(result, self._speed(step_seconds))
            is_last = self.state.step == self.total_steps
            if is_last or result.stop:
                self.checkpointer.save_and_wait(self.state)
            elif result.save:
                with self.meter.part(Part.CHECKPOINT):
                    self.checkpointer.save(self.state)
            self.meter.end()
            if result.stop and not is_last:
                return False
            self._validate_if_due()
        return True

    def _report_step(self, result: StepResult, images_per_second: float) -> None:
        step = self.state.step
        if StartPhase.FIRST_STEP not in self.phases.seconds:
            self.phases.end(StartPhase.FIRST_STEP)
            self.reporter.started(self.phases)
        if (performance := self.meter.measure()) is not None:
            self.reporter.performance(performance)
        self.reporter.progress(step, self.state.mean_loss, images_per_second)
        if self.metrics is not None:
            rate = self.learning_rate(step - 1)
            values = {"loss": result.loss, "learning rate": rate, "images per second": images_per_second}
            self.metrics.log_step(step, values, *result.by_timestep)

    def train_step(self) -> StepResult:
        """Run one optimizer step over one global batch.

        Raises:
            ConfigError: loss or gradients are not finite; the parameters are unchanged.
            FabricError: a peer was lost.
        """
        step = self.state.step
        self.gradients.clear()
        with self.gradients.passes():
            self._accumulate(step)
        self.gradients.signals[Signal.NOTICES] = float(self.notice.given)
        self.gradients.signals[Signal.SAVE_DUE] = float(self.checkpointer.due(step + 1))
        with self.meter.part(Part.EXCHANGE):
            self.gradients.reduce(self.world)
        norm = self.gradients.norm() / self._loss_scale
        # The only place in a step where the host waits for the device.
        with self.meter.part(Part.SYNC):
            common = torch.cat([self.gradients.signals, norm.view(1), self.gradients.by_timestep.flatten()]).tolist()
        (loss_sum, num_samples, notices, save_due, norm_value), tenths = common[:5], common[5:]
        loss = loss_sum / num_samples
        overflowed = self.state.loss_scale is not None and math.isfinite(loss) and not math.isfinite(norm_value)
        if not overflowed and not (math.isfinite(loss) and math.isfinite(norm_value)):
            raise ConfigError(
                f"training.learningRate: loss {loss} and gradient norm {norm_value} in step {step} are not finite; "
                "use a lower learning rate, or precision fp32"
            )
        with self.meter.part(Part.CHECKPOINT):
            self.checkpointer.before_update()
        with self.state.updating():
            set_learning_rate(self.state.optimizer, self.learning_rate(step))
            if not overflowed:
                self._step_optimizer(norm_value)
            self._update_loss_scale(overflowed)
            self.state.step = step + 1
            self.state.losses.append(loss)
            if self.state.ema is not None:
                self.state.ema.update(step + 1)
            self.checkpointer.mark_updated()
        return StepResult(
            loss, notices > 0, save_due > 0, (tenths[:NUM_TIMESTEP_BUCKETS], tenths[NUM_TIMESTEP_BUCKETS:])
        )

    @property
    def _loss_scale(self) -> float:
        return 1.0 if self.state.loss_scale is None else self.state.loss_scale.value

    def _step_optimizer(self, norm: float) -> None:
        """Step the optimizer with the unscaled, clipped gradients. In most steps the factor is 1."""
        factor = clip_factor(norm, self.spec.training.max_grad_norm) / self._loss_scale
        if factor != 1.0:
            self.gradients.scale(factor)
        self.state.optimizer.step()
        self.state.refresh()

    def _update_loss_scale(self, overflowed: bool) -> None:
        """Lower the loss scale after an overflow; record a finite step otherwise, which may raise the scale.

        Raises:
            ConfigError: the scale cannot be reduced further.
        """
        if self.state.loss_scale is not None:
            (self.state.loss_scale.record_overflow if overflowed else self.state.loss_scale.record_finite)()

    def _accumulate(self, step: int) -> None:
        """Add the gradients of this rank's share of the global batch; every sample has the weight 1 / global batch.

        Raises:
            ConfigError: memory runs out with one sample.
        """
        positions = rank_share(step, self.spec.global_batch, self.world.rank, self.world.size)
        while not self._try_accumulate(step, positions):
            if not self.passes.release("memory ran out next to that of the graphs"):
                self.micro_batch.halve(len(positions))
            self.gradients.drop_passes()
        size = self.micro_batch.size
        most = most_micro_batches(self.spec.global_batch, self.world.size, size)
        if self.gradients.forward_is_collective and math.ceil(len(positions) / size) < most:
            self._run_empty_pass(step)

    def _run_empty_pass(self, step: int) -> None:
        """Run a forward and a backward pass with zero weight, because the other ranks have one sample more."""
        batch = self.batches.take(self._refs(range(step, step + 1)), [])
        torch.autograd.backward(self.method.losses(batch).sum() * 0)

    def _try_accumulate(self, step: int, positions: range) -> bool:
        """Add the gradients of these positions. Return False, with some of them added, if memory ran out.

        Raises:
            ConfigError: memory ran out, and the step cannot be repeated.
        """
        parts = self.batches.split(self._refs(positions), self.micro_batch.size)
        next_step = rank_share(step + 1, self.spec.global_batch, self.world.rank, self.world.size)
        following = next(iter(self.batches.split(self._refs(next_step), self.micro_batch.size)), [])
        first = positions.start
        self.meter.start_passes()
        try:
            for part, then in zip(parts, [*parts[1:], following], strict=False):
                batch = self.batches.take(part, then)
                self.meter.add(batch)
                seed = self.draws.torch_seed(Purpose.DROPOUT, SampleRef(step, first))
                first += len(part)
                self.passes.run(batch, seed, self._loss_scale, part is parts[-1])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if self.gradients.forward_is_collective:
                # A pass with collectives cannot be repeated by one rank alone.
                raise self.micro_batch.too_large_error(len(positions)) from error
            return False
        return True

    def _refs(self, positions: range) -> list[SampleRef]:
        seed, num_samples = self.spec.training.seed, len(self.batches.source)
        return [sample_at(seed, num_samples, position) for position in positions]

    def _validate_if_due(self) -> None:
        """Save and validate the state if a validation is due and no earlier attempt has recorded it."""
        step = self.state.step
        if self.validator is None or not self.validator.due(step) or self.validator.is_recorded(step):
            return
        is_saved = self.checkpointer.try_to_save(self.state)
        self.passes.make_room()
        self.reporter.state(RankState.VALIDATING)
        # If the state is saved, a preemption notice does not have to wait for the validation.
        with self.notice.released() if is_saved else contextlib.nullcontext(), self.state.averaged():
            self.validator.validate(step)

    def _speed(self, step_seconds: deque[float]) -> float:
        """Return the images per second of all ranks over the last steps."""
        return self.spec.global_batch * len(step_seconds) / sum(step_seconds)
