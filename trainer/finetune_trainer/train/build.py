"""Builds the parts of a run: data, method, state, checkpointer, loop. Called by `run`, in the order of its phases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from torch import Tensor

from finetune_contract import paths
from finetune_contract.identity import DATASET, InputIdentity
from finetune_contract.methods import encodes_text, precision_of
from finetune_contract.run_spec import RunSpec
from finetune_contract.spec import Offload, Sharding
from finetune_trainer.checkpoint.checkpointer import Checkpointer, SaveOptions
from finetune_trainer.checkpoint.sharded_state import ShardedState, make_sharded_state
from finetune_trainer.checkpoint.state import TrainState
from finetune_trainer.checkpoint.store.base import CheckpointStore, checkpoint_name
from finetune_trainer.checkpoint.store.select import JobFolders, make_store
from finetune_trainer.data.cache.sample_identity import SampleIdentity
from finetune_trainer.data.cache.scan_index import FileChecks
from finetune_trainer.data.images.decoding import read_conditions
from finetune_trainer.data.prefetch import Prefetcher
from finetune_trainer.data.prepare import DataRequirements, Preparation, PreparedData
from finetune_trainer.data.sampling.draws import Draws
from finetune_trainer.data.sampling.order import total_steps
from finetune_trainer.data.sampling.schedule_checks import check_length
from finetune_trainer.data.sources.base import SampleSet
from finetune_trainer.distributed.gradients import Gradients
from finetune_trainer.distributed.sharding import ShardedGradients, Shards
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import ConfigError
from finetune_trainer.export.formats.about import About
from finetune_trainer.export.outputs import Export
from finetune_trainer.methods.method import Method, MethodContext
from finetune_trainer.methods.registry import method_class, method_traits
from finetune_trainer.models.direct import EarlyDenoiser
from finetune_trainer.optim.optimizer import learning_rate
from finetune_trainer.performance.meter import StepMeter
from finetune_trainer.performance.setup import make_meter
from finetune_trainer.train.artifact_sync import ArtifactSync
from finetune_trainer.train.context import RankContext
from finetune_trainer.train.earlier_work import INPUTS, TRAINING, describe_training
from finetune_trainer.train.hardware import has_bf16
from finetune_trainer.train.input_record import changed_message
from finetune_trainer.train.inputs import RunInputs
from finetune_trainer.train.loop import Loop
from finetune_trainer.train.metrics_logger import MetricsLogger
from finetune_trainer.train.micro_batch import MicroBatch
from finetune_trainer.train.passes.eager import Passes, PassWork
from finetune_trainer.train.passes.make import make_passes
from finetune_trainer.train.storage import make_complete_gradients, make_complete_state
from finetune_trainer.train.trackers import TrackedRun, open_trackers
from finetune_trainer.train.tuning.arithmetic import set_up_gpu
from finetune_trainer.train.tuning.choose import Tuner
from finetune_trainer.train.validation import Validator, best_validation


@dataclass(frozen=True)
class RunBuilder:
    """Builds the parts of one rank's run."""

    context: RankContext
    world: World
    inputs: RunInputs
    artifacts: ArtifactSync

    @property
    def spec(self) -> RunSpec:
        """The run, with local paths and with the settings of its memory preset."""
        return self.inputs.spec

    def prepare_data(self) -> PreparedData:
        """Run the map phase: all ranks fill the caches."""
        # The pictures' images are checked now, and read again after the map phase.
        self._read_conditions()
        reporter, training = self.context.reporter, self.spec.training
        method, traits = method_class(training.method), method_traits(training.method)
        return Preparation(
            spec=self.spec,
            requirements=DataRequirements(
                captions=method.captions(training),
                needs_captions=traits.needs_captions,
                caches_text=not encodes_text(training),
                conditioning=traits.needs_conditioning,
            ),
            family=self.inputs.family,
            world=self.world,
            dtype=self.inputs.dtype,
            cache_dir=self.context.cache_dir,
            report=reporter.detail,
            warn=reporter.warn,
            check_length=self._check_length,
            record=partial(self.inputs.record.add_samples, DATASET, self.context.spec.dataset.source),
            record_class_images=self._record_class_images,
            checks=self.file_checks,
        ).run()

    @cached_property
    def file_checks(self) -> FileChecks | None:
        """Compares the files of a recorded data set in the background; None if this attempt records it."""
        return FileChecks() if self.inputs.record.has_samples(DATASET) else None

    @cached_property
    def denoiser(self) -> EarlyDenoiser:
        """Loads the denoiser; a later attempt does this while it opens the data, which is already encoded."""
        method = method_class(self.spec.training.method)
        place = method.denoiser_place(self.inputs.dtype, self.world.device)
        return EarlyDenoiser(self.inputs.family, *place)

    def confirm_data(self) -> None:
        """Wait until the files of the data set are compared with what the first attempt recorded. All ranks call it.

        Raises:
            DataError: a file has changed.
        """
        if self.file_checks is not None:
            source = self.context.spec.dataset.source
            self.inputs.record.confirm_files(DATASET, source, self.file_checks.first_changed())

    def _check_length(self, num_samples: int) -> None:
        """Check the length of the run.

        Raises:
            ConfigError: the learning rate never reaches its peak.
        """
        context, training = self.context, self.spec.training
        steps = total_steps(training.steps, training.epochs, num_samples, self.spec.global_batch)
        check_length(training, steps, context.attempt, context.reporter.warn if self.world.is_first else lambda _: None)

    def _record_class_images(self, found: SampleIdentity, images: SampleSet) -> None:
        dreambooth = self.context.spec.training.dreambooth
        assert dreambooth is not None
        location = dreambooth.class_images or ""
        self.inputs.record.add_samples("training.dreambooth.classImages", location, found, images)

    def make_method(self, data: PreparedData) -> Method:
        """Load the models and prepare them for training."""
        inputs = self.inputs
        training, reason = self._tuner.choose_compile(data.batches, self._total_steps(data))
        set_up_gpu(self.world.device, precision_of(training))
        self._tuner.prepare_compiler(training, reason)
        draws, device = Draws(training.seed), self.world.device
        uses_ipex = inputs.uses_ipex
        context = MethodContext(inputs.family, training, draws, device, inputs.dtype, self.denoiser, uses_ipex)
        return method_class(training.method)(context)

    def make_state(self, method: Method) -> TrainState:
        """Return the state before the first step; sharded if the run specifies it.

        Raises:
            ConfigError: the method cannot be sharded.
        """
        training = self.spec.training
        if training.sharding is Sharding.NONE:
            return make_complete_state(training, method, self.world.device)
        parameters = method.parameters()
        shards: Shards | None = None
        if self.world.size > 1 or training.offload is not Offload.NONE:
            if not method.sharded_modules():
                raise ConfigError(f"training.sharding: {training.method} cannot be sharded; leave it out")
            shards = Shards(
                method.sharded_modules(), parameters, self.world, training.offload, training.exchange_precision
            )
            parameters = shards.parameters
        return make_sharded_state(training, self.world, parameters, shards)

    def make_checkpointer(self) -> Checkpointer:
        """Return the checkpointer with this rank's store."""
        context = self.context
        options = SaveOptions(
            best=lambda: best_validation(context.job_dir / paths.VALIDATION / paths.LOSSES),
            pause=context.notice.pause,
            mtbf_seconds=context.mtbf_seconds,
            min_part_bytes=context.min_part_bytes,
            about=self._about,
            check=self._check_inputs,
            earlier=self.inputs.earlier,
        )
        return Checkpointer(self.spec, self.world, self.store, context.reporter, options)

    @cached_property
    def store(self) -> CheckpointStore:
        """This rank's storage of checkpoints."""
        context = self.context
        folders = JobFolders(context.job_dir, context.scratch, self.inputs.bucket)
        store = make_store(self.spec, context.attempt, folders, self.world.rank)
        store.on_stage = context.on_save_stage
        return store

    def make_export(self, step: int) -> Export:
        """Return the export of the weights after a step; it continues an earlier one of the same checkpoint.

        Raises:
            StorageError: the storage of the checkpoints cannot be read.
        """
        context = self.context
        newest, attempt = self.store.durable.newest()
        source = checkpoint_name(step, attempt) if newest == step else ""
        about = About.of_run(self.spec, context.job_dir, context.cache_dir, step)
        return Export(context.delivery, self.spec.uid, source, context.reporter.outputs, context.on_save_stage, about)

    def _about(self) -> dict[str, Any]:
        """Return what a checkpoint says of the run."""
        identities = [each.model_dump(by_alias=True, exclude_none=True) for each in self.inputs.record.identities]
        return {TRAINING: describe_training(self.spec.training), INPUTS: identities}

    def _check_inputs(self, values: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of this job that was trained on other inputs. Older checkpoints do not name them.

        Raises:
            ConfigError: with what has changed.
        """
        before = [InputIdentity.model_validate(each) for each in values.get(INPUTS, ())]
        if changes := self.inputs.record.compare(before):
            raise ConfigError(changed_message("; ".join(changes), self.spec.job))

    def make_loop(self, method: Method, state: TrainState, data: PreparedData, checkpointer: Checkpointer) -> Loop:
        """Return the training loop, and open the trackers."""
        steps = self._total_steps(data)
        training, _ = self._tuner.choose_compile(data.batches, steps)
        self._tuner.choose_attention(method, data.batches)
        self._tuner.choose_layout(method, data.batches)
        metrics = self._make_metrics_logger(state.step)
        gradients = self._make_gradients(method, state)
        num_timesteps = self.inputs.family.objective.num_timesteps
        batches, micro_batch = Prefetcher(data.batches), MicroBatch(training.batch_size, self.context.reporter.warn)
        passes = make_passes(
            training,
            PassWork(method, gradients, self.spec.global_batch, num_timesteps),
            self.world,
            self.context.reporter.note,
        )
        return Loop(
            spec=self.spec,
            world=self.world,
            method=method,
            batches=batches,
            draws=Draws(training.seed),
            state=state,
            gradients=gradients,
            learning_rate=learning_rate(training, steps),
            checkpointer=checkpointer,
            notice=self.context.notice,
            reporter=self.context.reporter,
            validator=self._make_validator(method, data, steps, metrics, state.first_step),
            total_steps=steps,
            micro_batch=micro_batch,
            passes=passes,
            metrics=metrics,
            phases=self.context.phases,
            meter=self._make_meter(batches, micro_batch, passes),
        )

    def _make_meter(self, batches: Prefetcher, micro_batch: MicroBatch, passes: Passes) -> StepMeter:
        def changing() -> dict[str, Any]:
            choice = passes.choice
            graphs = {"has_cuda_graphs": choice.enabled, "cuda_graphs_off": choice.reason or None}
            return {"batch_size": micro_batch.size, **graphs}

        return make_meter(
            self.spec.training,
            self.inputs.family,
            self.world,
            self.context.job_dir,
            has_bf16(self.world.device),
            lambda: batches.waited_seconds,
            changing,
        )

    def _total_steps(self, data: PreparedData) -> int:
        training = self.spec.training
        return total_steps(training.steps, training.epochs, len(data.batches.source), self.spec.global_batch)

    @property
    def _tuner(self) -> Tuner:
        context = self.context
        folders = JobFolders(context.job_dir, context.scratch, self.inputs.bucket)
        return Tuner(self.spec, self.world, folders, context.cache_dir, context.reporter)

    def _make_gradients(self, method: Method, state: TrainState) -> Gradients:
        if isinstance(state, ShardedState) and state.shards is not None:
            return ShardedGradients(state.shards, self.world)
        return make_complete_gradients(self.spec.training, method, state, self.world)

    def _make_metrics_logger(self, step: int) -> MetricsLogger | None:
        names = self.spec.training.trackers
        if not names or not self.world.is_first:
            return None
        trackers = open_trackers(names, TrackedRun(self.spec, self.context.job_dir, step))
        return MetricsLogger(trackers, self.inputs.family.objective.num_timesteps, self.context.reporter.warn)

    def _make_validator(
        self, method: Method, data: PreparedData, steps: int, metrics: MetricsLogger | None, first_step: int
    ) -> Validator | None:
        training, family = self.spec.training, self.inputs.family
        if training.validation is None:
            return None
        return Validator(
            spec=training.validation,
            world=self.world,
            method=method,
            family=family,
            text=method.text or data.text,
            batches=data.batches,
            held_out=data.held_out,
            resolution=self._picture_size,
            batch_size=training.batch_size,
            total_steps=steps,
            first_step=first_step,
            epoch=(len(data.batches.source), self.spec.global_batch),
            conditions=self._read_conditions(),
            job_dir=self.context.job_dir,
            on_progress=self.context.reporter.detail,
            metrics=metrics,
            on_results=self.artifacts.push_validation,
        )

    @property
    def _picture_size(self) -> int:
        pixels = self.inputs.family.pixels_per_latent
        return self.spec.training.resolution // pixels * pixels

    def _read_conditions(self) -> list[Tensor]:
        """Return the conditioning images of the pictures.

        Raises:
            DataError: one is missing or broken.
        """
        validation = self.spec.training.validation
        return [] if validation is None else read_conditions(validation.images, self._picture_size)
