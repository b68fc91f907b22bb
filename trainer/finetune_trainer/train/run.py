"""The life of a rank: meet the others, load, cache, restore, train, export."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune_contract import environment
from finetune_contract.beat import RankState
from finetune_contract.exit_codes import ExitCode
from finetune_contract.run_spec import RunSpec
from finetune_contract.spec import Precision
from finetune_trainer.checkpoint.store import CheckpointStore
from finetune_trainer.data.batches import Augmentation, BatchMaker, Latents
from finetune_trainer.data.draws import Draws
from finetune_trainer.data.encode import LatentCache, LiveLatents, TextCache
from finetune_trainer.data.hashes import FileHashes
from finetune_trainer.data.order import total_steps
from finetune_trainer.data.source import Source, all_square, open_source
from finetune_trainer.distributed.buckets import GradientBuckets
from finetune_trainer.distributed.world import World, join_world
from finetune_trainer.errors import ConfigError
from finetune_trainer.export.outputs import check_outputs, write_outputs
from finetune_trainer.methods.method import Method, MethodContext
from finetune_trainer.methods.registry import method_class
from finetune_trainer.models.base import open_base
from finetune_trainer.models.family import Family
from finetune_trainer.train.ema import Ema
from finetune_trainer.train.loop import Loop
from finetune_trainer.train.notice import Notice
from finetune_trainer.train.optimizer import learning_rate, make_optimizer
from finetune_trainer.train.report import Reporter
from finetune_trainer.train.saving import Checkpointer
from finetune_trainer.train.state import TrainState
from finetune_trainer.train.validation import MAX_HELD_OUT, Validator

DTYPES = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16}


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
        on_save_stage: see CheckpointStore.
    """

    spec: RunSpec
    attempt: int
    job_dir: Path
    cache_dir: Path
    notice: Notice
    reporter: Reporter
    on_save_stage: Callable[[str], None] = lambda _: None


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
    torch.use_deterministic_algorithms(world.device.type == "cpu")
    run = _Run(context, world)
    return run.to_its_end()


def check_spec(spec: RunSpec) -> None:
    """Refuse what this trainer cannot do, before anything is loaded.

    Raises:
        ConfigError: naming the field.
    """
    if spec.training.precision not in DTYPES:
        known = ", ".join(precision.value for precision in DTYPES)
        raise ConfigError(f"training.precision: {spec.training.precision.value} is not available; use one of {known}")
    if spec.training.steps is None and spec.training.epochs is None:
        raise ConfigError("training.steps: neither steps nor epochs is given; write one of them")
    check_outputs(spec.outputs, method_class(spec.training.method).formats)


class _Run:
    """One rank's run, its parts made in order."""

    def __init__(self, context: RankContext, world: World) -> None:
        spec = context.spec
        self._context = context
        self._world = world
        self._spec = spec
        self._draws = Draws(spec.training.seed)
        self._dtype = DTYPES[spec.training.precision]
        self._family: Family = open_base(spec.model)
        self._source = open_source(spec.dataset, spec.dataset.split, spec.dataset.max_samples)
        self._total_steps = total_steps(spec.training.steps, spec.training.epochs, len(self._source), spec.global_batch)
        self._hashes = FileHashes(context.cache_dir / "hashes.json")
        self._text = TextCache(context.cache_dir, self._family, self._hashes, self._dtype)

    def to_its_end(self) -> ExitCode:
        """Cache, load, restore, train, export."""
        context, training = self._context, self._spec.training
        context.reporter.state(RankState.CACHING)
        held_out = self._open_held_out()
        self._cache_text(held_out)
        batches = self._batches()
        held_out_batches = None if held_out is None else self._held_out_batches(held_out)
        if self._world.is_first:
            self._hashes.keep()
        context.reporter.state(RankState.LOADING)
        method = method_class(training.method)(
            MethodContext(self._family, training, self._draws, self._world.device, self._dtype)
        )
        state = self._state(method)
        checkpointer = self._checkpointer()
        context.reporter.state(RankState.RESTORING)
        checkpointer.restore(state)
        loop = self._loop(method, state, batches, checkpointer, self._validator(method, held_out_batches))
        # What was made so far lives on; only what a step makes is worth looking through for garbage.
        gc.freeze()
        gc.enable()
        with context.notice.held():
            if not loop.run():
                return ExitCode.SAVED
            self._export(method, state)
        self._world.close()
        return ExitCode.DONE

    def _cache_text(self, held_out: Source | None) -> None:
        captions = [self._source.caption(index) for index in range(len(self._source))]
        if held_out is not None:
            captions += [held_out.caption(index) for index in range(len(held_out))]
        validation = self._spec.training.validation
        if validation is not None and validation.prompts:
            captions += ["", *validation.prompts]
        self._text.fill(captions, self._world, lambda done, of: self._context.reporter.detail(f"{done}/{of} captions"))

    def _batches(self) -> BatchMaker:
        """Batches of the training split, with its latents in the cache unless each drawing is a new one."""
        training = self._spec.training
        random_crop = not training.center_crop and not all_square(self._source)
        augmentation = Augmentation(random_crop, training.random_flip)
        latents: Latents
        if random_crop:
            self._context.reporter.warn(
                "training.centerCrop: images are not square and are cropped at random, so they are encoded anew in "
                "every step; centerCrop: true lets them be encoded once"
            )
            encoder = self._family.load_image_encoder(self._world.device)
            latents = LiveLatents(encoder, self._source, training.resolution)
        else:
            latents = self._latent_cache(self._source, augmentation)
        return BatchMaker(
            self._source, latents, self._text, self._family, self._draws, augmentation, self._world.device
        )

    def _latent_cache(self, source: Source, augmentation: Augmentation) -> LatentCache:
        cache = LatentCache(self._context.cache_dir, self._family, self._hashes, source, self._spec.training.resolution)
        cache.fill(
            augmentation.fixed_views(),
            self._world,
            lambda done, of: self._context.reporter.detail(f"{done}/{of} images"),
        )
        return cache

    def _open_held_out(self) -> Source | None:
        validation = self._spec.training.validation
        if validation is None or validation.split is None:
            return None
        return open_source(self._spec.dataset, validation.split, MAX_HELD_OUT)

    def _held_out_batches(self, held_out: Source) -> BatchMaker:
        assert self._spec.training.validation is not None
        draws = Draws(self._spec.training.validation.seed)
        augmentation = Augmentation(random_crop=False, random_flip=False)
        latents = self._latent_cache(held_out, augmentation)
        return BatchMaker(held_out, latents, self._text, self._family, draws, augmentation, self._world.device)

    def _state(self, method: Method) -> TrainState:
        parameters = method.parameters()
        optimizer = make_optimizer(self._spec.training, parameters.values())
        return TrainState(parameters, optimizer, Ema(parameters) if self._spec.training.ema else None)

    def _checkpointer(self) -> Checkpointer:
        context, store = self._context, None
        if self._world.is_first:
            store = CheckpointStore(
                context.job_dir, self._spec.uid, context.attempt, self._spec.keep, context.on_save_stage
            )
        return Checkpointer(self._spec, self._world, store, context.reporter)

    def _validator(self, method: Method, held_out: BatchMaker | None) -> Validator | None:
        validation = self._spec.training.validation
        if validation is None:
            return None
        side = self._spec.training.resolution // self._family.latent_shape[1]
        return Validator(
            spec=validation,
            world=self._world,
            method=method,
            family=self._family,
            text=self._text,
            held_out=held_out,
            latent_size=(side, side),
            batch_size=self._spec.training.batch_size,
            total_steps=self._total_steps,
            job_dir=self._context.job_dir,
            say=self._context.reporter.detail,
        )

    def _loop(
        self,
        method: Method,
        state: TrainState,
        batches: BatchMaker,
        checkpointer: Checkpointer,
        validator: Validator | None,
    ) -> Loop:
        return Loop(
            spec=self._spec,
            world=self._world,
            method=method,
            batches=batches,
            draws=self._draws,
            state=state,
            buckets=GradientBuckets(list(method.parameters().values()), self._world.device),
            learning_rate=learning_rate(self._spec.training, self._total_steps),
            checkpointer=checkpointer,
            notice=self._context.notice,
            reporter=self._context.reporter,
            validator=validator,
            total_steps=self._total_steps,
        )

    def _export(self, method: Method, state: TrainState) -> None:
        """Rank 0 writes the outputs; the others wait, so that all end when they are there."""
        self._context.reporter.state(RankState.EXPORTING)
        if self._world.is_first:
            with state.averaged():
                self._context.reporter.outputs(write_outputs(method, self._spec.outputs, self._context.job_dir))
        self._world.barrier()


def read_context(
    env: Mapping[str, str], notice: Notice, reporter: Reporter, on_save_stage: Callable[[str], None]
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
    except (OSError, ValueError) as error:
        raise ConfigError(f"{environment.RUN_SPEC}: {spec_file} is no run specification: {error}") from error
    return RankContext(spec, attempt, job_dir, cache_dir, notice, reporter, on_save_stage)
