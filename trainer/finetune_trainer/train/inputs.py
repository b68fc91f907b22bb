"""Loads the inputs of a run: fetched files, the base model, settings of the memory preset. All ranks load them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from finetune_contract.bucket import Bucket
from finetune_contract.run_spec import RunSpec
from finetune_contract.spec import Precision
from finetune_trainer.checkpoint.store.select import JobFolders, open_bucket
from finetune_trainer.distributed.world import World
from finetune_trainer.fetched import fetch
from finetune_trainer.models.base import open_base
from finetune_trainer.models.family import Family
from finetune_trainer.train.context import RankContext
from finetune_trainer.train.hardware import apply_preset

_DTYPES = {Precision.FP32: torch.float32, Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}


@dataclass(frozen=True)
class RunInputs:
    """Inputs of a run.

    Attributes:
        spec: the run, with local paths and with the settings of its memory preset.
        family: the base model.
        dtype: number format of the weights that are not trained.
        bucket: the job's folder in an object store; None if it has none.
    """

    spec: RunSpec
    family: Family
    dtype: torch.dtype
    bucket: Bucket | None


def load_inputs(context: RankContext, world: World, env: Mapping[str, str]) -> RunInputs:
    """Fetch files, open the base and apply the memory preset. All ranks call it.

    Raises:
        RankError: something cannot be fetched, opened or applied.
    """
    spec = _fetch_files(context, world)
    family = _open_base(spec, context, world)
    spec = _apply_preset(spec, context, family, world, env)
    return RunInputs(spec, family, _DTYPES[spec.training.precision], open_bucket(context.bucket))


def _fetch_files(context: RankContext, world: World) -> RunSpec:
    """Return the run with local copies of what is in object stores.

    Rank 0 fetches first, so that on a shared disk the other ranks find the files.
    """
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
    """Open the base. If it must be converted first, rank 0 converts it and the others use the result."""
    if world.is_first:
        family = open_base(spec.model, context.cache_dir)
    world.barrier()
    return family if world.is_first else open_base(spec.model, context.cache_dir)


def _apply_preset(spec: RunSpec, context: RankContext, family: Family, world: World, env: Mapping[str, str]) -> RunSpec:
    """Return the run with the settings of its memoryPreset; rank 0 reports them to the user."""
    choice = apply_preset(spec, family, world, JobFolders(context.job_dir, context.scratch), env)
    if choice is None:
        return spec
    if world.is_first:
        context.reporter.note(choice.explanation)
    return spec.model_copy(update={"training": choice.training})
