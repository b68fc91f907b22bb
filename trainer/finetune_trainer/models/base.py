"""Opening of a base model: every kind of base that a manifest can name becomes a local folder in diffusers' layout."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from finetune_contract.input_spec import ModelSpec
from finetune_trainer.errors import ConfigError
from finetune_trainer.models.family import Family
from finetune_trainer.models.hub import ONE_PART, HubFiles, fetch, has_weights
from finetune_trainer.models.single_file import SUFFIXES, convert
from finetune_trainer.models.stable_diffusion import StableDiffusion
from finetune_trainer.models.stable_diffusion_xl import StableDiffusionXl

_INDEX = "model_index.json"
_COMMIT = re.compile(r"[0-9a-f]{40}")

FAMILIES: dict[str, type[Family]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXl,
}
"""Families by the pipeline class in a base's model_index.json."""


def open_base(spec: ModelSpec, cache_dir: Path | None = None, *, whole: bool = False) -> Family:
    """Find the base model and return its family. Weights are read later, except those of a single file.

    Args:
        spec: the manifest's model.
        cache_dir: folder that all jobs share; a single-file base is converted to a folder in it.
        whole: whether the parts that training does not use are needed, too, because a pipeline will be written.

    Raises:
        ConfigError: the base is missing, or its family is not supported.
        NetworkError: the hub cannot be reached.
        StorageError: the cache cannot be written.
    """
    if cache_dir is not None and is_single_file(spec.base):
        config = None if spec.config is None else hub_commit(Path(spec.config))
        formats = {name: family.single_file for name, family in FAMILIES.items() if family.single_file is not None}
        folder = convert(spec, cache_dir, formats, config)
    else:
        files = HubFiles.of_base(spec.variant, own_vae=spec.vae is None, whole=whole)
        folder = find_folder(spec.base, spec.revision, "model.base", files)
    if not (folder / _INDEX).is_file():
        raise ConfigError(
            f"model.base: {folder} contains no {_INDEX}; write a folder in diffusers' layout or a hub id of one"
        )
    pipeline = read_json(folder / _INDEX).get("_class_name")
    if pipeline not in FAMILIES:
        raise ConfigError(
            f"model.base: {spec.base} is a {pipeline}, which is not supported; use one of {', '.join(FAMILIES)}"
        )
    vae_folder = (
        folder / "vae"
        if spec.vae is None
        else find_part(spec.vae, None, "model.vae", HubFiles(spec.variant, is_part=True))
    )
    return FAMILIES[pipeline](folder, vae_folder, spec.variant)


def is_single_file(base: str) -> bool:
    """Return whether a base is one file on this machine."""
    return base.endswith(SUFFIXES) and Path(base).is_file()


def find_folder(name: str, revision: str | None, field: str, files: HubFiles) -> Path:
    """Return the local folder of a model; a hub id is downloaded to HF_HOME.

    Args:
        name: path of a folder, or hub id.
        revision: revision on the hub; None for the default branch.
        field: field of the manifest, for messages.
        files: the files of a hub repository that are needed.

    Raises:
        ConfigError: the model does not exist or cannot be used.
        NetworkError: the hub cannot be reached.
        StorageOutageError: the cache is full, or fails.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.suffix in (".pt", ".bin"):
        raise ConfigError(f"{field}: {name} is a pickle, which can run code when it is read; convert it to safetensors")
    if path.is_file():
        raise ConfigError(f"{field}: {name} is a single file; write a folder in diffusers' layout or a hub id")
    if "://" in name:
        raise ConfigError(f"{field}: {name} is not a supported location; write a folder or a hub id")
    if name.startswith(("/", "./", "../", "~")):
        raise ConfigError(
            f"{field}: the folder {name} does not exist; write one that is mounted in the job's pods, or a hub id"
        )
    return fetch(name, revision, field, files)


def find_part(name: str, revision: str | None, field: str, files: HubFiles = ONE_PART) -> Path:
    """Return the local folder of a model next to the base (a VAE, a ControlNet); see `find_folder`.

    Args:
        name: path of a folder, or hub id.
        revision: revision on the hub; None for the default branch.
        field: field of the manifest, for messages.
        files: the files of a hub repository that are needed. If it lacks their variant, as repositories of single
            parts often do, the default weights are.
    """
    folder = find_folder(name, revision, field, files)
    if files.variant is None or has_weights(folder, files.variant) or Path(name).is_dir():
        return folder
    return find_folder(name, revision, field, dataclasses.replace(files, variant=None))


def hub_commit(folder: Path) -> str | None:
    """Return the commit of a folder that was downloaded from the hub; None for any other folder.

    The hub's library keeps each commit in .../models--owner--name/snapshots/<commit>/.
    """
    for path in (folder, *folder.parents):
        if path.parent.name == "snapshots" and _COMMIT.fullmatch(path.name):
            return path.name
    return None


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of one of the base's JSON files.

    Raises:
        ConfigError: the file is missing or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.base: {path} cannot be read: {error}; use a complete copy of the base") from error
    if not isinstance(value, dict):
        raise ConfigError(f"model.base: {path} is not a JSON object; use a complete copy of the base")
    return value
