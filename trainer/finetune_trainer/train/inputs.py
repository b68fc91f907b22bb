"""Loads the inputs of a run: fetched files, the base model, settings of the memory preset. All ranks load them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune_contract.bucket import Bucket
from finetune_contract.identity import DATASET
from finetune_contract.methods import needs_whole_base, precision_of
from finetune_contract.outputs.request import written_in_training
from finetune_contract.run_spec import RunSpec
from finetune_contract.spec import LoraSpec, Precision, TextualInversionSpec
from finetune_trainer import patience
from finetune_trainer.checkpoint.store.select import JobFolders, has_checkpoints, open_bucket
from finetune_trainer.data.sampling.schedule_checks import check_schedule
from finetune_trainer.data.sources.hub import find_commit
from finetune_trainer.data.sources.open import is_on_hub
from finetune_trainer.data.training_sets import fetch_datasets, fetch_images
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import ConfigError, DataError
from finetune_trainer.fetched import fetch
from finetune_trainer.intel.paths import ComputePath
from finetune_trainer.methods import adapter_file, embedding_file
from finetune_trainer.methods.adapter_file import check_adapter_file, find_adapter_file
from finetune_trainer.methods.embedding_file import check_embedding_files, find_embedding_files
from finetune_trainer.methods.lora import WEIGHTS_NAME
from finetune_trainer.models.base import find_part, hub_commit, is_single_file, open_base
from finetune_trainer.models.family import Family
from finetune_trainer.models.fingerprint import fingerprint_files
from finetune_trainer.models.hub import ANY_WEIGHTS, CONFIGURATIONS, EMBEDDINGS, ONE_PART, HubFiles
from finetune_trainer.models.single_file import configuration_files
from finetune_trainer.models.text import TextSettings
from finetune_trainer.train.checks import ignored_revisions
from finetune_trainer.train.context import RankContext
from finetune_trainer.train.earlier_work import EarlierWork
from finetune_trainer.train.hardware import apply_preset, choose_precision
from finetune_trainer.train.input_record import InputRecord
from finetune_trainer.train.pin_store import PinStore
from finetune_trainer.train.tuning.processor import ProcessorTuner

_CONTROLNET = "training.controlnet.base"
_CONFIG = "model.config"
_DTYPES = {Precision.FP32: torch.float32, Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}


@dataclass(frozen=True)
class RunInputs:
    """Inputs of a run.

    Attributes:
        spec: the run, with local paths, pinned revisions and the settings of its memory preset.
        family: the base model.
        dtype: number format of the weights that are not trained.
        bucket: the job's folder in an object store; None if it has none.
        record: what the run trains on.
        earlier: checkpoint of another job to start from; None if the manifest names none.
        needs_checkpoint: whether the base of a LoRA or an embedding was left out, because the job has checkpoints.
        resumes: whether the job has checkpoints.
        uses_ipex: whether IPEX computes linear layers and convolutions.
    """

    spec: RunSpec
    family: Family
    dtype: torch.dtype
    bucket: Bucket | None
    record: InputRecord
    earlier: EarlierWork | None
    needs_checkpoint: bool
    resumes: bool
    uses_ipex: bool = False


def load_inputs(context: RankContext, world: World, env: Mapping[str, str]) -> RunInputs:
    """Fetch files, open the base and apply the memory preset. All ranks call it.

    Raises:
        RankError: something cannot be fetched, opened or applied, or has changed since the first attempt.
    """
    for text in ignored_revisions(context.spec) if world.is_first else ():
        context.reporter.warn(text)
    bucket = open_bucket(context.bucket)
    folders = JobFolders(context.job_dir, context.scratch, bucket)
    has_own = patience.wait_out("checkpoint storage: reading", lambda: has_checkpoints(folders))
    resumes = max(world.gather_numbers(int(has_own))) > 0
    record = InputRecord.open(context.spec.job, world, PinStore(context.job_dir, bucket), context.reporter)
    earlier = _find_earlier(context, folders, world, record)
    if earlier is not None and not resumes and world.is_first:
        patience.wait_out("checkpoint.from: reading", earlier.check)
    spec = _fetch_files(context, world)
    spec = _fetch_parts(spec, context.spec, world, record)
    with_starts = spec
    spec = _fetch_starts(spec, context, world, record, resumes)
    has_start = spec != with_starts
    spec, family = _open_base(spec, context, world, record)
    family.text_settings = TextSettings.of(spec.training)
    check_schedule(
        spec.training, family.objective.num_timesteps, context.attempt, _warn_once(world, context.reporter.warn)
    )
    spec = _apply_preset(pin_dataset(spec, record), context, folders, family, world, env)
    path = ProcessorTuner(spec, family, world, folders, context.cache_dir, context.reporter, resumes).choose()
    spec = _choose_precision(spec, context, folders, world, path)
    dtype = _DTYPES[precision_of(spec.training)]
    return RunInputs(spec, family, dtype, bucket, record, earlier, resumes and has_start, resumes, path.uses_ipex)


def _find_earlier(context: RankContext, folders: JobFolders, world: World, record: InputRecord) -> EarlierWork | None:
    source, reporter = context.spec.start_from, context.reporter
    if source is None:
        return None
    note = reporter.note if world.is_first else lambda _: None
    return EarlierWork(source, context.spec, folders, lambda: record.identities, note)


def _warn_once(world: World, warn: Callable[[str], None]) -> Callable[[str], None]:
    """Return a function with which rank 0 warns for all ranks."""
    return warn if world.is_first else lambda _: None


def _fetch_files(context: RankContext, world: World) -> RunSpec:
    """Return the run with local copies of what is in object stores.

    Rank 0 fetches first, so that on a shared disk the other ranks find the files.
    """
    spec = context.spec

    def fetched(location: str, field: str) -> str:
        return fetch(location, field, context.cache_dir, context.reporter.detail)

    with _first_rank_first(world):
        model = {"base": fetched(spec.model.base, "model.base")}
        if spec.model.vae is not None:
            model["vae"] = fetched(spec.model.vae, "model.vae")
        if spec.model.config is not None and is_single_file(model["base"]):
            model["config"] = fetched(spec.model.config, _CONFIG)
        training = spec.training
        if training.controlnet is not None and training.controlnet.base is not None:
            base = fetched(training.controlnet.base, _CONTROLNET)
            training = training.model_copy(update={"controlnet": training.controlnet.model_copy(update={"base": base})})
        training = fetch_images(training, fetched)
        dataset = fetch_datasets(spec.dataset, fetched)
    return spec.model_copy(
        update={
            "model": spec.model.model_copy(update=model),
            "dataset": dataset,
            "training": training,
        }
    )


def _fetch_parts(spec: RunSpec, manifest: RunSpec, world: World, record: InputRecord) -> RunSpec:
    """Return the run with local folders of what is next to the base: VAE, configuration, ControlNet to start from."""
    model, training = spec.model, spec.training
    if model.vae is not None:
        needed = HubFiles(model.variant, is_part=True)
        folder = _fetch_part("model.vae", model.vae, manifest.model.vae, world, record, needed)
        model = model.model_copy(update={"vae": str(folder)})
    if model.config is not None and is_single_file(model.base):
        folder = _fetch_part(_CONFIG, model.config, manifest.model.config, world, record, CONFIGURATIONS)
        model = model.model_copy(update={"config": str(folder)})
    controlnet = training.controlnet
    if controlnet is not None and controlnet.base is not None:
        assert manifest.training.controlnet is not None
        folder = _fetch_part(_CONTROLNET, controlnet.base, manifest.training.controlnet.base, world, record, ONE_PART)
        training = training.model_copy(update={"controlnet": controlnet.model_copy(update={"base": str(folder)})})
    return spec.model_copy(update={"model": model, "training": training})


def _fetch_starts(spec: RunSpec, context: RankContext, world: World, record: InputRecord, resumes: bool) -> RunSpec:
    """Return the run with local files of the LoRA or the embedding that its first step starts from, and check them.

    A run that resumes does not need them, and leaves them out.
    """
    training = spec.training
    changes: dict[str, LoraSpec | TextualInversionSpec] = {}
    lora, inversion = training.lora, training.textual_inversion
    if lora is not None and lora.base is not None:
        path = None
        if not resumes:
            start = _fetch_start(adapter_file.FIELD, lora.base, context, world, record, ANY_WEIGHTS)
            path = find_adapter_file(start, WEIGHTS_NAME)
            check_adapter_file(path, lora)
        changes["lora"] = lora.model_copy(update={"base": None if path is None else str(path)})
    if inversion is not None and inversion.base is not None:
        folder = None
        if not resumes:
            folder = _fetch_start(embedding_file.FIELD, inversion.base, context, world, record, EMBEDDINGS)
            check_embedding_files(find_embedding_files(folder), inversion)
        changes["textual_inversion"] = inversion.model_copy(update={"base": None if folder is None else str(folder)})
    return spec.model_copy(update={"training": training.model_copy(update=changes)})


def _fetch_start(  # noqa: PLR0913, PLR0917  every argument differs between the calls
    field: str, location: str, context: RankContext, world: World, record: InputRecord, needed: HubFiles
) -> Path:
    """Return the local file or folder that a method starts from, and record which one it is."""
    with _first_rank_first(world):
        name = fetch(location, field, context.cache_dir, context.reporter.detail)
    if not Path(name).is_file():
        return _fetch_part(field, name, location, world, record, needed)
    _add_files(field, location, [Path(name)], world, record)
    return Path(name)


def _fetch_part(  # noqa: PLR0913, PLR0917  every argument differs between the calls
    field: str, name: str, location: str | None, world: World, record: InputRecord, needed: HubFiles
) -> Path:
    """Return the local folder of a model, and record which one it is.

    Args:
        field: its field in the manifest.
        name: its folder, or its hub id.
        location: what the manifest has there.
        world: the ranks.
        record: what the run trains on.
        needed: the files of a hub repository that are needed.
    """
    folder = find_part(name, record.revision(field, None), field, needed) if world.is_first else Path()
    commit = world.share(hub_commit(folder) if not Path(name).exists() else None)
    if not world.is_first:
        folder = find_part(name, commit, field, needed)
    if commit is not None:
        record.add_commit(field, name, commit, ConfigError)
    else:
        files = configuration_files(folder) if needed.without_weights else _files_of_part(folder)
        _add_files(field, location or name, files, world, record)
    return folder


def _files_of_part(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".bin", ".pt")]


def _open_base(spec: RunSpec, context: RankContext, world: World, record: InputRecord) -> tuple[RunSpec, Family]:
    """Open the base, and record which one it is. If it must be converted first, rank 0 does, the others use the result.

    Returns:
        The run with the revision of the base, and the base.
    """
    field, model = "model.base", spec.model
    model = model.model_copy(update={"revision": record.revision(field, model.revision)})
    whole = needs_whole_base(spec.training.method, written_in_training(spec.outputs))
    family = open_base(model, context.cache_dir, whole=whole) if world.is_first else None
    is_local = Path(model.base).exists()
    commit = world.share(None if family is None or is_local else hub_commit(family.denoiser_files()[0].parent))
    if commit is not None:
        model = model.model_copy(update={"revision": commit})
    if family is None:
        family = open_base(model, context.cache_dir, whole=whole)
    if commit is not None:
        record.add_commit(field, model.base, commit, ConfigError)
    elif Path(model.base).is_file():
        # The folder that it is converted to contains the versions of the libraries.
        _add_files(field, context.spec.model.base, [Path(model.base)], world, record)
    else:
        _add_files(field, context.spec.model.base, _base_files(family, model.vae is None), world, record)
    return spec.model_copy(update={"model": model}), family


def _base_files(family: Family, with_vae: bool) -> list[Path]:
    """Return the files of the base that training uses; none if its folder is not complete."""
    try:
        vae = family.image_encoder_files() if with_vae else []
        return [*family.denoiser_files(), *family.text_encoder_files(), *vae]
    except OSError:
        # What is missing is reported when it is loaded.
        return []


def _add_files(field: str, location: str, files: list[Path], world: World, record: InputRecord) -> None:
    """Record local files. If a rank cannot read them, their loading reports it."""
    try:
        found = fingerprint_files(files)
    except OSError:
        found = {}
    if min(world.gather_numbers(len(found))) > 0:
        record.add_files(field, location, found, ConfigError)


def pin_dataset(spec: RunSpec, record: InputRecord) -> RunSpec:
    """Return the run with the commit of each data set on the hub. The first attempt asks the hub for it."""
    dataset = spec.dataset
    additional = [
        each.model_copy(
            update={"revision": _pin_commit(f"dataset.additional[{number}].source", each.source, each.revision, record)}
        )
        for number, each in enumerate(dataset.additional)
    ]
    pinned = {
        "revision": _pin_commit(DATASET, dataset.source, dataset.revision, record),
        "additional": tuple(additional),
    }
    return spec.model_copy(update={"dataset": dataset.model_copy(update=pinned)})


def _pin_commit(field: str, source: str, requested: str | None, record: InputRecord) -> str | None:
    """Return the commit of a data set on the hub, and record it; for other data sets what the manifest requests."""
    if not record.world.share(is_on_hub(source)):
        return requested
    revision = record.revision(field, None)
    if revision is None and record.world.is_first:
        revision = find_commit(source, requested)
    if (revision := record.world.share(revision)) is None:
        return requested
    record.add_commit(field, source, revision, DataError)
    return revision


@contextlib.contextmanager
def _first_rank_first(world: World) -> Iterator[None]:
    """Let rank 0 run the block before the other ranks do."""
    if not world.is_first:
        world.barrier()
    yield
    if world.is_first:
        world.barrier()


def _choose_precision(
    spec: RunSpec, context: RankContext, folders: JobFolders, world: World, path: ComputePath
) -> RunSpec:
    """Return the run with a number format; rank 0 reports one that the manifest leaves out."""
    if world.device.type == "cpu":
        return spec.model_copy(update={"training": spec.training.model_copy(update={"precision": path.precision})})
    training = choose_precision(spec.training, world, folders)
    if spec.training.precision is None and world.is_first and world.device.type != "cpu":
        context.reporter.note(f"precision {precision_of(training).value}: the manifest names none")
    return spec.model_copy(update={"training": training})


def _apply_preset(  # noqa: PLR0913, PLR0917  every argument is needed
    spec: RunSpec, context: RankContext, folders: JobFolders, family: Family, world: World, env: Mapping[str, str]
) -> RunSpec:
    """Return the run with the settings of its memoryPreset; rank 0 reports them to the user."""
    choice = apply_preset(spec, family, world, folders, env)
    if choice is None:
        return spec
    if world.is_first:
        context.reporter.note(choice.explanation)
    return spec.model_copy(update={"training": choice.training})
