"""Turns a manifest file into a job: reads YAML, applies `--set`, makes paths absolute, runs the API's checks."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune_contract.input_spec import DatasetSpec
from finetune_operator.api import yaml_text
from finetune_operator.api.job import KIND, FineTuneJob
from finetune_operator.api.validate import InvalidJob, parse_job
from finetune_operator.cli.errors import UsageError

MAX_MANIFEST_BYTES = 1024 * 1024
"""The API server has the same limit."""
_URL = re.compile(r"^[a-z][a-z0-9+.-]*://")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


@dataclass(frozen=True)
class ManifestFile:
    """The contents of a manifest file.

    Attributes:
        job: the job, with the paths as the user wrote them.
        document: the job as the user wrote it, with the settings of `--set`.
        siblings: further objects in the file, such as the job's PersistentVolumeClaim.
    """

    job: FineTuneJob
    document: dict[str, Any]
    siblings: tuple[dict[str, Any], ...]


def load_manifest(path: Path, settings: Sequence[str] = ()) -> FineTuneJob:
    """Read a manifest into a job whose paths are absolute.

    Args:
        path: the YAML (or JSON) file; relative paths in it are relative to its folder.
        settings: `--set` values below spec, e.g. 'training.steps=50'.

    Raises:
        UsageError: the file cannot be read, or is not a valid FineTuneJob.
    """
    return make_absolute(read_manifest(path, settings).job, path.absolute().parent)


def read_manifest(path: Path, settings: Sequence[str] = ()) -> ManifestFile:
    """Read a manifest; see `load_manifest`."""
    document, siblings = _read_yaml(path)
    for setting in settings:
        _apply_setting(document, setting)
    try:
        job = parse_job(document)
    except InvalidJob as error:
        raise UsageError("\n".join(f"{path}: {message}" for message in error.messages)) from error
    return ManifestFile(job, document, siblings)


def make_absolute(job: FineTuneJob, folder: Path) -> FineTuneJob:
    """Make the job's paths independent of the current folder."""
    spec = job.spec
    controlnet = spec.training.controlnet
    if controlnet is not None and controlnet.base:
        controlnet = controlnet.model_copy(update={"base": absolute_source(controlnet.base, folder)})
    dreambooth, validation = spec.training.dreambooth, spec.training.validation
    if dreambooth is not None and dreambooth.class_images is not None:
        dreambooth = dreambooth.model_copy(update={"class_images": absolute_source(dreambooth.class_images, folder)})
    if validation is not None:
        images = tuple(absolute_output(each, folder) for each in validation.images)
        validation = validation.model_copy(update={"images": images})
    lora, inversion = spec.training.lora, spec.training.textual_inversion
    if lora is not None and lora.base is not None:
        lora = lora.model_copy(update={"base": absolute_source(lora.base, folder)})
    if inversion is not None and inversion.base is not None:
        inversion = inversion.model_copy(update={"base": absolute_source(inversion.base, folder)})
    checkpoint, start = spec.checkpoint, spec.checkpoint.from_
    if start is not None and start.path is not None:
        start = start.model_copy(update={"path": absolute_output(start.path, folder)})
        checkpoint = checkpoint.model_copy(update={"from_": start})
    script = spec.training.script
    if script is not None and script.path is not None and is_own_script(script.path, folder):
        script = script.model_copy(update={"path": absolute_output(script.path, folder)})
    model = {"base": absolute_source(spec.model.base, folder)}
    if spec.model.vae:
        model["vae"] = absolute_source(spec.model.vae, folder)
    if spec.model.config:
        model["config"] = absolute_source(spec.model.config, folder)
    changes = {
        "model": spec.model.model_copy(update=model),
        "dataset": _absolute_dataset(spec.dataset, folder),
        "checkpoint": checkpoint,
        "training": spec.training.model_copy(
            update={
                "controlnet": controlnet,
                "dreambooth": dreambooth,
                "validation": validation,
                "lora": lora,
                "textual_inversion": inversion,
                "script": script,
            }
        ),
        "outputs": tuple(
            output.model_copy(update={"to": absolute_output(output.to, folder)}) for output in spec.outputs
        ),
    }
    return job.model_copy(update={"spec": spec.model_copy(update=changes)})


def _absolute_dataset(dataset: DatasetSpec, folder: Path) -> DatasetSpec:
    additional = tuple(
        each.model_copy(update={"source": absolute_source(each.source, folder)}) for each in dataset.additional
    )
    source = absolute_source(dataset.source, folder)
    return dataset.model_copy(update={"source": source, "additional": additional})


def absolute_source(text: str, folder: Path) -> str:
    """Make a path absolute; keep a hub id or a URL. 'owner/name' is a path only if `is_local` is true."""
    if _URL.match(text) or (is_hub_id(text) and not is_local(text, folder)):
        return text
    return absolute_output(text, folder)


def absolute_output(text: str, folder: Path) -> str:
    """Make a path absolute; keep a URL."""
    return text if _URL.match(text) else os.path.normpath(folder / Path(text).expanduser())


def is_own_script(path: str, folder: Path) -> bool:
    """Return whether the path of a script is a file of the user: a name alone may be an example of diffusers."""
    return "/" in path or (folder / path).exists()


def is_hub_id(text: str) -> bool:
    """Return whether a text has the form of a hub id: owner/name."""
    return _HUB_ID.match(text) is not None


def is_local(text: str, folder: Path) -> bool:
    """Return whether a text of the form owner/name is a path: it exists, or its parent folder does."""
    path = folder / text
    return path.exists() or path.parent.is_dir()


def is_url(text: str) -> bool:
    """Return whether a text begins with a scheme, e.g. s3://."""
    return _URL.match(text) is not None


def _read_yaml(path: Path) -> tuple[dict[str, Any], tuple[dict[str, Any], ...]]:
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise UsageError(f"{path} is larger than {MAX_MANIFEST_BYTES} bytes, the limit for a manifest")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist") from error
    except IsADirectoryError as error:
        raise UsageError(f"{path} is a folder; write the path of the manifest in it") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not text; a manifest is YAML or JSON in UTF-8") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    return _find_job(path, text)


def _find_job(path: Path, text: str) -> tuple[dict[str, Any], tuple[dict[str, Any], ...]]:
    """Return the only FineTuneJob of a text, and the other objects next to it."""
    try:
        documents = list(yaml_text.load_all(text))
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {_locate(error)}") from error
    jobs = [one for one in documents if isinstance(one, dict) and one.get("kind") == KIND]
    if len(documents) > 1 and len(jobs) == 1:
        others = (one for one in documents if isinstance(one, dict) and one is not jobs[0])
        return jobs[0], tuple(others)
    if len(documents) != 1:
        raise UsageError(f"{path} contains {len(documents)} documents; write a file with one FineTuneJob")
    document = documents[0]
    if not isinstance(document, dict):
        raise UsageError(f"{path} contains a {type(document).__name__}, not an object with kind: FineTuneJob")
    return document, ()


def _locate(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return f"line {mark.line + 1}: {problem}" if mark else problem


def _apply_setting(document: dict[str, Any], setting: str) -> None:
    path, equals, text = setting.partition("=")
    names = path.strip().removeprefix("spec.").split(".")
    if not equals or not all(names):
        raise UsageError(f"--set {setting!r}: write FIELD=VALUE, e.g. --set training.steps=50")
    parent: Any = document.setdefault("spec", {})
    for name in names[:-1]:
        parent = parent.setdefault(name, {}) if isinstance(parent, dict) else None
        parent = parent if parent is not None else {}
    if not isinstance(parent, dict):
        raise UsageError(f"--set {setting!r}: {'.'.join(names[:-1])} has no fields")
    try:
        parent[names[-1]] = yaml_text.load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {setting!r}: {_locate(error)}") from error


def describe_difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "spec") -> Iterable[str]:
    """Yield a message for each field that differs, e.g. 'spec.training.steps is 50 and would become 60'."""
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if before == after:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from describe_difference(before, after, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name} is {_shorten(before)} and would become {_shorten(after)}"


def _shorten(value: Any) -> str:
    text = "unset" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
