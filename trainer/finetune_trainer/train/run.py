"""The life of a rank: meet the others, load, cache, restore, train, export."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError

from finetune_contract import environment, paths
from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import RankState
from finetune_contract.interval import DEFAULT_MTBF_SECONDS
from finetune_contract.run_spec import RunSpec
from finetune_contract.spec import Offload, Optimizer, Precision, Sharding, TrainingSpec
from finetune_trainer import heap
from finetune_trainer.checkpoint.checkpointer import Checkpointer, SaveOptions
from finetune_trainer.checkpoint.sharded_state import make_sharded_state
from finetune_trainer.checkpoint.split import MIN_PART_BYTES
from finetune_trainer.checkpoint.state import TrainState
from finetune_trainer.checkpoint.store.select import Places, make_store, open_bucket
from finetune_trainer.data.prefetch import Prefetcher
from finetune_trainer.data.prepare import Demand, Preparation, PreparedData
from finetune_trainer.data.sampling.draws import Draws
from finetune_trainer.data.sampling.order import total_steps
from finetune_trainer.distributed.buckets import GradientBuckets
from finetune_trainer.distributed.gradients import Gradients
from finetune_trainer.distributed.local import LocalGradients
from finetune_trainer.distributed.sharding import ShardedGradients, Shards
from finetune_trainer.distributed.world import World, join_world
from finetune_trainer.errors import ConfigError, FabricError
from finetune_trainer.export.outputs import check_outputs, write_outputs
from finetune_trainer.fetched import fetch
from finetune_trainer.methods.method import Method, MethodContext
from finetune_trainer.methods.registry import method_class
from finetune_trainer.models.base import open_base
from finetune_trainer.models.family import Family
from finetune_trainer.optim.ema import Ema
from finetune_trainer.optim.loss_scale import LossScale
from finetune_trainer.optim.optimizer import learning_rate, make_optimizer
from finetune_trainer.report import Reporter
from finetune_trainer.train.artifact_sync import ArtifactSync
from finetune_trainer.train.loop import Loop
from finetune_trainer.train.machine import apply_preset
from finetune_trainer.train.metrics_logger import MetricsLogger
from finetune_trainer.train.micro_batch import MicroBatch
from finetune_trainer.train.preemption_notice import PreemptionNotice
from finetune_trainer.train.trackers import Run, check_trackers, open_trackers
from finetune_trainer.train.validation import Validator, best_validation

DTYPES = {Precision.FP32: torch.float32, Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}


@dataclass(frozen=True)
class RankContext:
    """What a rank is started with.

    Attributes:
        spec: what to do.
        attempt: which attempt this is, from 1.
        job_dir: the job's folder on the shared storage.
        cache_dir: folder shared by all jobs.
        notice: SIGTERM.
        reporter: the way to the supervisor.
        on_save_stage: see FolderStore.
        scratch: the job's folder on this node's own disk, where checkpoints go there first.
        bucket: URL of the job's folder in an object store, where checkpoints go there.
        min_part_bytes: see Checkpointer.
        mtbf_seconds: see Checkpointer.
    """

    spec: RunSpec
    attempt: int
    job_dir: Path
    cache_dir: Path
    notice: PreemptionNotice
    reporter: Reporter
    on_save_stage: Callable[[str], None] = lambda _: None
    scratch: Path | None = None
    bucket: str | None = None
    min_part_bytes: int = MIN_PART_BYTES
    mtbf_seconds: float = DEFAULT_MTBF_SECONDS


def run_rank(context: RankContext, env: Mapping[str, str] = os.environ) -> ExitCode:
    """Run one rank to its end.

    Returns:
        DONE, or SAVED where a notice came.

    Raises:
        RankError: it cannot go on.
    """
    check_spec(context.spec)
    world = join_world(env)
    context.reporter.state(RankState.LOADING)
    be_deterministic(world.device)
    if world.device.type == "cpu":
        heap.keep_freed(env)
    run = _Run(context, world, env)
    return run.to_its_end()


def be_deterministic(device: torch.device) -> None:
    """On CPUs only algorithms whose results are the same each time."""
    torch.use_deterministic_algorithms(device.type == "cpu")
    # torch would fill all new memory, to show who reads it too early: a pass more over every activation and gradient.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def check_spec(spec: RunSpec) -> None:
    """Refuse what this trainer cannot do, before anything is loaded.

    Raises:
        ConfigError: naming the field.
    """
    if spec.training.steps is None and spec.training.epochs is None:
        raise ConfigError("training.steps: neither steps nor epochs is given; write one of them")
    dreambooth = spec.training.dreambooth
    if spec.training.aspect_buckets and dreambooth is not None and dreambooth.class_prompt is not None:
        raise ConfigError("training.aspectBuckets: class images are squares; leave it out, or dreambooth.classPrompt")
    if spec.dataset.streaming and not (spec.training.center_crop or spec.training.aspect_buckets):
        raise ConfigError(
            "dataset.streaming: a random crop needs the image again in each epoch; write training.centerCrop: true or "
            "training.aspectBuckets: true, or leave streaming out"
        )
    if spec.training.sharding is not Sharding.NONE:
        check_sharded(spec.training)
    elif spec.training.offload is not Offload.NONE:
        raise ConfigError("training.offload: only slices can lie in the host's memory; write sharding: full")
    check_trackers(spec.training.trackers)
    check_outputs(spec.outputs, method_class(spec.training.method).formats)


def check_sharded(training: TrainingSpec) -> None:
    """Refuse what slices cannot do.

    Raises:
        ConfigError: naming the field.
    """
    if training.precision is Precision.FP16:
        raise ConfigError("training.precision: fp16 does not go with sharding; write bf16")
    if training.optimizer is not Optimizer.ADAMW:
        raise ConfigError(f"training.optimizer: {training.optimizer.value} does not go with sharding; write adamw")
    if training.aspect_buckets:
        raise ConfigError("training.aspectBuckets: ranks would make unequal numbers of passes, which sharding forbids")


class _Run:
    """One rank's run, its parts made in order."""

    def __init__(self, context: RankContext, world: World, env: Mapping[str, str]) -> None:
        self._context = context
        self._world = world
        spec = _with_local_files(context, world)
        self._family = _open_base(spec, context, world)
        self._spec = _with_preset(spec, context, self._family, world, env)
        self._dtype = DTYPES[self._spec.training.precision]
        self._bucket = open_bucket(context.bucket)
        self._mirror = ArtifactSync(context.job_dir, self._bucket)
        self._shards: Shards | None = None

    def to_its_end(self) -> ExitCode:
        """Cache, load, restore, train, export."""
        context = self._context
        context.reporter.state(RankState.CACHING)
        data = self._prepare_data()
        # The encoders are gone.
        heap.give_back()
        context.reporter.state(RankState.LOADING)
        method = self._method()
        state = self._state(method)
        checkpointer = self._checkpointer()
        context.reporter.state(RankState.RESTORING)
        if self._world.is_first:
            self._mirror.pull_validation()
        checkpointer.restore(state)
        context.notice.when_orphaned(lambda: checkpointer.rescue(state))
        loop = self._loop(method, state, data, checkpointer)
        # What was made so far lives on; only what a step makes is worth looking through for garbage.
        gc.freeze()
        gc.enable()
        context.notice.hold()
        try:
            if not loop.run():
                return ExitCode.SAVED
        except FabricError:
            checkpointer.rescue(state)
            raise
        finally:
            if loop.journal is not None:
                loop.journal.close()
        self._export(method, state)
        self._world.close()
        return ExitCode.DONE

    def _prepare_data(self) -> PreparedData:
        context, training = self._context, self._spec.training
        method = method_class(training.method)
        return Preparation(
            spec=self._spec,
            demand=Demand(
                captions=method.captions(training),
                needs_captions=method.needs_captions,
                caches_text=not method.encodes_text(training),
                conditioning=method.needs_conditioning,
            ),
            family=self._family,
            world=self._world,
            dtype=self._dtype,
            cache_dir=context.cache_dir,
            say=context.reporter.detail,
            warn=context.reporter.warn,
        ).run()

    def _method(self) -> Method:
        training = self._spec.training
        context = MethodContext(self._family, training, Draws(training.seed), self._world.device, self._dtype)
        return method_class(training.method)(context)

    def _state(self, method: Method) -> TrainState:
        training, world = self._spec.training, self._world
        parameters = method.parameters()
        if training.sharding is Sharding.NONE:
            return TrainState(
                parameters,
                make_optimizer(training, parameters.values()),
                Ema(parameters) if training.ema else None,
                loss_scale=LossScale() if training.precision is Precision.FP16 else None,
            )
        if world.size > 1 or training.offload is not Offload.NONE:
            if not method.sharded_modules():
                raise ConfigError(f"training.sharding: {training.method} cannot be cut into slices; leave it out")
            self._shards = Shards(method.sharded_modules(), parameters, world, training.offload)
            parameters = self._shards.parameters
        return make_sharded_state(training, world, parameters, self._shards)

    def _gradients(self, method: Method) -> Gradients:
        if self._shards is not None:
            return ShardedGradients(self._shards, self._world)
        parameters = list(method.parameters().values())
        if self._world.size == 1:
            return LocalGradients(parameters, self._world.device)
        return GradientBuckets(parameters, self._world.device)

    def _checkpointer(self) -> Checkpointer:
        context = self._context
        options = SaveOptions(
            best=lambda: best_validation(context.job_dir / paths.VALIDATION / paths.LOSSES),
            mtbf_seconds=context.mtbf_seconds,
            min_part_bytes=context.min_part_bytes,
        )
        places = Places(context.job_dir, context.scratch, self._bucket)
        store = make_store(self._spec, context.attempt, places, self._world.rank)
        store.on_stage = context.on_save_stage
        return Checkpointer(self._spec, self._world, store, context.reporter, options)

    def _loop(self, method: Method, state: TrainState, data: PreparedData, checkpointer: Checkpointer) -> Loop:
        training = self._spec.training
        num_samples = len(data.batches.source)
        steps = total_steps(training.steps, training.epochs, num_samples, self._spec.global_batch)
        journal = self._journal(state.step)
        return Loop(
            spec=self._spec,
            world=self._world,
            method=method,
            batches=Prefetcher(data.batches),
            draws=Draws(training.seed),
            state=state,
            buckets=self._gradients(method),
            learning_rate=learning_rate(training, steps),
            checkpointer=checkpointer,
            notice=self._context.notice,
            reporter=self._context.reporter,
            validator=self._validator(method, data, steps, journal),
            total_steps=steps,
            micro_batch=MicroBatch(training.batch_size, self._context.reporter.warn),
            num_timesteps=self._family.schedule.num_timesteps,
            journal=journal,
        )

    def _journal(self, step: int) -> MetricsLogger | None:
        names = self._spec.training.trackers
        if not names or not self._world.is_first:
            return None
        trackers = open_trackers(names, Run(self._spec, self._context.job_dir, step))
        return MetricsLogger(trackers, self._family.schedule.num_timesteps, self._context.reporter.warn)

    def _validator(
        self, method: Method, data: PreparedData, steps: int, journal: MetricsLogger | None
    ) -> Validator | None:
        training = self._spec.training
        if training.validation is None:
            return None
        side = training.resolution // self._family.latent_shape[1]
        return Validator(
            spec=training.validation,
            world=self._world,
            method=method,
            family=self._family,
            text=method.text or data.text,
            batches=data.batches,
            held_out=data.held_out,
            latent_size=(side, side),
            batch_size=training.batch_size,
            total_steps=steps,
            job_dir=self._context.job_dir,
            say=self._context.reporter.detail,
            journal=journal,
            noted=self._mirror.push_validation,
        )

    def _export(self, method: Method, state: TrainState) -> None:
        """Rank 0 writes the outputs; the others wait, so that all end when they are there."""
        self._context.reporter.state(RankState.EXPORTING)
        with state.exported():
            if self._world.is_first:
                outputs = write_outputs(method, self._spec.outputs, self._context.job_dir)
                self._context.reporter.outputs(self._mirror.push_outputs(outputs))
        self._world.barrier()


def _with_local_files(context: RankContext, world: World) -> RunSpec:
    """The run with what lies in object stores fetched: by rank 0 first, so that on a shared disk the others find it."""
    spec = context.spec

    def fetched(location: str, field: str) -> str:
        return fetch(location, field, context.cache_dir, context.reporter.detail)

    if not world.is_first:
        world.barrier()
    model = {"base": fetched(spec.model.base, "model.base")}
    if spec.model.vae is not None:
        model["vae"] = fetched(spec.model.vae, "model.vae")
    source = spec.dataset.source
    data = {"source": source if spec.dataset.streaming else fetched(source, "dataset.source")}
    if world.is_first:
        world.barrier()
    return spec.model_copy(
        update={"model": spec.model.model_copy(update=model), "dataset": spec.dataset.model_copy(update=data)}
    )


def _open_base(spec: RunSpec, context: RankContext, world: World) -> Family:
    """The base; where it has to be converted first, one rank does it and the others find it done."""
    if world.is_first:
        family = open_base(spec.model, context.cache_dir)
    world.barrier()
    return family if world.is_first else open_base(spec.model, context.cache_dir)


def _with_preset(spec: RunSpec, context: RankContext, family: Family, world: World, env: Mapping[str, str]) -> RunSpec:
    """The run with the settings that its memoryPreset comes to, which a person is told."""
    choice = apply_preset(spec, family, world, Places(context.job_dir, context.scratch), env)
    if choice is None:
        return spec
    if world.is_first:
        context.reporter.note(choice.sentence)
    return spec.model_copy(update={"training": choice.training})


def read_context(
    env: Mapping[str, str], notice: PreemptionNotice, reporter: Reporter, on_save_stage: Callable[[str], None]
) -> RankContext:
    """Read what the supervisor has set.

    Raises:
        ConfigError: a variable is missing, or the run specification is none.
    """
    try:
        spec_file = Path(env[environment.RUN_SPEC])
        job_dir = Path(env[environment.CHECKPOINT_DIR])
        cache_dir = Path(env[environment.CACHE_DIR])
        attempt = int(env[environment.ATTEMPT])
    except KeyError as error:
        raise ConfigError(f"{error.args[0]} is not set; start ranks by the supervisor") from error
    except ValueError as error:
        raise ConfigError(f"{environment.ATTEMPT} is no number: {error}") from error
    try:
        spec = RunSpec.read(spec_file)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or environment.RUN_SPEC
        raise ConfigError(f"{where}: {first['msg']} (in the run specification {spec_file})") from error
    except OSError as error:
        raise ConfigError(f"{environment.RUN_SPEC}: {spec_file} cannot be read: {error.strerror}") from error
    min_part_bytes = int(env.get(environment.MIN_PART_BYTES, MIN_PART_BYTES))
    return RankContext(
        spec,
        attempt,
        job_dir,
        cache_dir,
        notice,
        reporter,
        on_save_stage,
        scratch=Path(env[environment.SCRATCH_DIR]) if env.get(environment.SCRATCH_DIR) else None,
        bucket=env.get(environment.BUCKET) or None,
        min_part_bytes=min_part_bytes,
        mtbf_seconds=float(env.get(environment.MTBF_SECONDS) or DEFAULT_MTBF_SECONDS),
    )
