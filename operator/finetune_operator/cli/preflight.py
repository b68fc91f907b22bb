"""What only this machine can know of a job, checked before anything starts. Each fault is a sentence with its field."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from finetune_contract.spec import DatasetSpec, Method, ModelSpec, OutputSpec
from finetune_operator.api.job import CONTROLLER, Accelerator, FineTuneJob, FineTuneJobSpec, StorageSpec, TopologySpec
from finetune_operator.api.rules.supported import find_missing
from finetune_operator.cli.manifest import is_hub_id, is_url
from finetune_operator.cluster.local.home import Home
from finetune_operator.cluster.local.kubelet.devices import find_gpus
from finetune_operator.cluster.local.settings import LOCAL
from finetune_operator.manifests import build_pod, num_nodes
from finetune_operator.manifests.merge import MergeError
from finetune_operator.plan.policies.unsupported import find_unsupported

METADATA = "metadata.jsonl"
FILE_NAME = "file_name"
"""Column of the image folder's convention, taken where the image column is missing."""
NUM_PROBED = 16
"""Samples whose image is looked for: enough for a wrong folder, and no wait on a large set."""
MIN_FREE_BYTES = 256 * 1024**2
"""Less than this leaves no room for a checkpoint beside the one before it."""
PICKLES = (".pt", ".bin", ".pth")
SINGLE_BASES = (".safetensors", ".ckpt")
"""Of a .ckpt the trainer reads weights only."""
TABLES = (".parquet", ".tar")
BARE_IMAGES = (Method.DREAMBOOTH, Method.DREAMBOOTH_LORA, Method.TEXTUAL_INVERSION)
"""Methods that need no captions."""


@dataclass(frozen=True)
class Machine:
    """What this machine has."""

    num_cores: int
    num_gpus: int


def this_machine() -> Machine:
    """The machine that we run on."""
    return Machine(len(os.sched_getaffinity(0)), len(find_gpus()))


def check(job: FineTuneJob, home: Home, machine: Machine) -> list[str]:
    """All faults of a job on this machine; its paths are absolute already.

    Returns:
        Sentences; empty where it can be run.
    """
    return [*_faults(job.spec, home, machine), *_template(job)]


def remarks(spec: FineTuneJobSpec) -> Iterator[str]:
    """What is worth a warning, and no reason to refuse the job."""
    if spec.secrets:
        yield (
            "spec.secrets: a local run has no Secrets; of your environment the trainer gets the variables of the hub "
            "(HF_TOKEN and the like)"
        )
    wanted, dataset = spec.dataset.max_samples, spec.dataset
    metadata = _metadata(dataset, dataset.split)
    if wanted is not None and metadata is not None:
        with metadata.open("rb") as file:
            found = sum(1 for line in islice(file, wanted) if line.strip())
        if found < wanted:
            yield f"spec.dataset.maxSamples: {wanted} samples are asked for, and {metadata} holds {found}"


def _faults(spec: FineTuneJobSpec, home: Home, machine: Machine) -> Iterator[str]:
    missing = [*find_unsupported(spec, LOCAL), *find_missing(spec)]
    yield from missing
    if spec.managed_by != CONTROLLER:
        yield f"spec.managedBy: {spec.managed_by} does not run here; leave managedBy out"
    if spec.suspend:
        yield "spec.suspend: a suspended job does not run; leave it out, and stop the run with Ctrl-C instead"
    yield from _topology(spec, machine)
    yield from _storage(spec.checkpoint.storage)
    # What the trainer cannot read anyway has had its sentence.
    if not any(sentence.startswith("spec.model") for sentence in missing):
        yield from _model(spec.model)
    if not any(sentence.startswith("spec.dataset") for sentence in missing):
        needs_captions = spec.training.method not in BARE_IMAGES
        yield from _dataset(spec.dataset, "dataset.split", spec.dataset.split, needs_captions)
        validation = spec.training.validation
        if validation is not None and validation.split is not None:
            yield from _dataset(spec.dataset, "training.validation.split", validation.split, needs_captions)
    for number, output in enumerate(spec.outputs):
        yield from _output(number, output)
    yield from _room(spec, home)


def _template(job: FineTuneJob) -> Iterator[str]:
    try:
        build_pod(job, 1, 0, LOCAL)
    except MergeError as error:
        yield f"spec.podTemplate: {error}"


def _topology(spec: FineTuneJobSpec, machine: Machine) -> Iterator[str]:
    topology = spec.topology
    num_ranks = num_nodes(spec) * topology.processes_per_node
    if topology.accelerator is Accelerator.GPU:
        if machine.num_gpus == 0:
            yield "spec.topology.accelerator: this machine has no GPU; write accelerator: cpu"
        elif num_ranks > machine.num_gpus:
            yield _too_many(topology, num_ranks, machine.num_gpus, "GPUs")
    elif num_ranks > machine.num_cores:
        yield _too_many(topology, num_ranks, machine.num_cores, "cores")


def _too_many(topology: TopologySpec, num_ranks: int, available: int, what: str) -> str:
    field = "processesPerNode" if topology.processes_per_node > available else "nodes"
    return (
        f"spec.topology.{field}: {num_ranks} ranks do not fit on the {available} {what} of this machine; "
        f"write nodes and processesPerNode whose product is at most {available}"
    )


def _storage(storage: StorageSpec | None) -> Iterator[str]:
    if storage is None:
        return
    if storage.nfs is not None:
        yield (
            "spec.checkpoint.storage.nfs: a local run mounts nothing; mount it yourself and write hostPath, or leave "
            "storage out for a folder in the state folder"
        )
    if storage.host_path is not None:
        path = Path(storage.host_path.path)
        if not path.is_absolute():
            yield f"spec.checkpoint.storage.hostPath.path: {path} is relative; write an absolute path"
        elif reason := _not_writable(path):
            yield f"spec.checkpoint.storage.hostPath.path: {reason}; write a folder that you may write to"


def _model(model: ModelSpec) -> Iterator[str]:
    yield from _model_path("spec.model.base", model.base)
    for field, part in (("config", model.config), ("vae", model.vae)):
        if part is not None:
            yield from _model_path(f"spec.model.{field}", part)


def _model_path(field: str, text: str) -> Iterator[str]:
    path = Path(text)
    if is_url(text) or (is_hub_id(text) and not path.is_absolute()):
        return
    if path.suffix in PICKLES:
        yield f"{field}: {path.name} is a pickle, which can run code when it is read; convert it to safetensors"
    elif path.is_file():
        if field.endswith("base") and path.suffix in SINGLE_BASES:
            return
        yield f"{field}: {path} is a single file; write a folder in diffusers' layout or a hub id (owner/name)"
    elif not path.is_dir():
        yield f"{field}: {path} does not exist; write a folder in diffusers' layout or a hub id (owner/name)"
    elif field.endswith(("base", "config")) and not (path / "model_index.json").is_file():
        yield f"{field}: {path} holds no model_index.json; write a folder in diffusers' layout or a hub id (owner/name)"
    elif field.endswith("vae") and not (path / "config.json").is_file():
        yield f"{field}: {path} holds no config.json; write the folder of a VAE in diffusers' layout"


def _dataset(dataset: DatasetSpec, split_field: str, split: str, needs_captions: bool) -> Iterator[str]:
    folder = Path(dataset.source)
    if is_url(dataset.source) or (is_hub_id(dataset.source) and not folder.is_absolute()):
        return
    if folder.is_file():
        if folder.suffix not in (".jsonl", *TABLES):
            yield (
                f"spec.dataset.source: {folder} is a file; write the folder that holds {METADATA}, a .jsonl, .parquet "
                "or .tar"
            )
        return
    if not folder.is_dir():
        yield f"spec.dataset.source: {folder} does not exist; write a folder with {METADATA} or a hub id (owner/name)"
        return
    metadata = _metadata(dataset, split)
    if metadata is None or metadata.parent == folder:
        splits = sorted(path.parent.name for path in folder.glob(f"*/{METADATA}"))
        if splits:
            yield f"spec.{split_field}: {folder} has no split {split!r}; write one of {', '.join(splits)}"
            return
    if metadata is None:
        if not needs_captions or any(path.suffix in TABLES for path in folder.rglob("*")):
            return
        yield f"spec.dataset.source: {folder} holds neither {METADATA} nor {split}/{METADATA}; write one"
        return
    yield from _samples(dataset, metadata)


def _metadata(dataset: DatasetSpec, split: str) -> Path | None:
    """The metadata.jsonl of a split: below its own folder, or for a data set without splits at the top."""
    folder = Path(dataset.source)
    candidates = (folder / split / METADATA, folder / METADATA)
    return next((path for path in candidates if path.is_file()), None)


def _samples(dataset: DatasetSpec, metadata: Path) -> Iterator[str]:
    """Look at the first samples; the trainer looks at all of them."""
    num_wanted = min(NUM_PROBED, dataset.max_samples or NUM_PROBED)
    try:
        with metadata.open(encoding="utf-8") as file:
            lines = list(islice(((number, line) for number, line in enumerate(file, 1) if line.strip()), num_wanted))
    except (OSError, UnicodeDecodeError) as error:
        yield f"spec.dataset.source: {metadata} cannot be read: {error}"
        return
    if not lines:
        yield f"spec.dataset.source: {metadata} holds no samples; write one JSON object a line"
    for number, line in lines:
        # One sentence says it all: the same fault is likely to be in every line.
        if fault := _sample_fault(dataset, metadata, number, line):
            yield fault
            return


def _sample_fault(dataset: DatasetSpec, metadata: Path, number: int, line: str) -> str | None:
    where = f"line {number} of {metadata}"
    try:
        row = json.loads(line)
    except ValueError as error:
        return f"spec.dataset.source: {where} is no JSON ({error}); write one JSON object a line"
    if not isinstance(row, dict):
        return f"spec.dataset.source: {where} is no JSON object; write one with the columns of the sample"
    columns = dataset.columns
    image = columns.image if columns.image in row else FILE_NAME
    if image not in row:
        return _no_column("image", columns.image, row, where)
    for field, column in (("caption", columns.caption), ("conditioning", columns.conditioning)):
        if column is not None and column not in row:
            return _no_column(field, column, row, where)
    return _content_fault(dataset, metadata, row, image, where)


def _content_fault(dataset: DatasetSpec, metadata: Path, row: Mapping[str, Any], image: str, where: str) -> str | None:
    caption = row[dataset.columns.caption]
    if not isinstance(caption, str):
        kind, column = type(caption).__name__, dataset.columns.caption
        return f"spec.dataset.columns.caption: {where} holds {kind} in {column!r}; write a column of texts"
    if not caption.strip():
        return f"spec.dataset.columns.caption: the caption in {where} is empty; write one, or another column"
    if not isinstance(row[image], str):
        return f"spec.dataset.columns.image: {where} holds no path in {image!r}; write the column of the image files"
    path = metadata.parent / row[image]
    if not path.is_file():
        return f"spec.dataset.source: the image {path} of {where} does not exist; put it there or mend the line"
    return None


def _no_column(field: str, column: str, row: Mapping[str, Any], where: str) -> str:
    names = ", ".join(sorted(map(str, row))) or "none"
    return f"spec.dataset.columns.{field}: there is no column {column!r} in {where}; write one of {names}"


def _output(number: int, output: OutputSpec) -> Iterator[str]:
    if not is_url(output.to) and (reason := _not_writable(Path(output.to))):
        yield f"spec.outputs[{number}].to: {reason}; write a folder that you may write to"


def _room(spec: FineTuneJobSpec, home: Home) -> Iterator[str]:
    """Whether checkpoints have room where they go."""
    storage = spec.checkpoint.storage
    folder, field = home.path, "checkpoint.storage"
    if storage is not None and storage.host_path is not None and storage.host_path.path.startswith("/"):
        folder, field = Path(storage.host_path.path), "checkpoint.storage.hostPath.path"
    free_bytes = shutil.disk_usage(_existing(folder)).free
    if free_bytes < MIN_FREE_BYTES:
        yield (
            f"spec.{field}: the disk of {folder} has {free_bytes // 1024**2} MiB left, and checkpoints want "
            f"{MIN_FREE_BYTES // 1024**2} MiB at least; make room or write another disk's folder"
        )


def _not_writable(folder: Path) -> str | None:
    """Why a folder cannot be written to, or made; None where it can."""
    existing = _existing(folder)
    if not existing.is_dir():
        return f"{existing} is not a folder"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"{existing} may not be written to"
    return None


def _existing(path: Path) -> Path:
    """The path itself or the nearest parent that exists."""
    return next(candidate for candidate in (path, *path.parents) if candidate.exists())
