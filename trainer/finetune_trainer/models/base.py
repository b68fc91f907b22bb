"""Opening of a base model: every kind of base that a manifest can name becomes a local folder in diffusers' layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune_contract.input_spec import ModelSpec
from finetune_trainer.errors import ConfigError
from finetune_trainer.models.family import Family
from finetune_trainer.models.single_file import SUFFIXES, convert
from finetune_trainer.models.stable_diffusion import StableDiffusion
from finetune_trainer.models.stable_diffusion_xl import StableDiffusionXl

_INDEX = "model_index.json"
_PATTERNS = ["*.json", "*.txt", "*.model", "*.safetensors"]
"""Files that are downloaded from a hub repository; never pickles."""

FAMILIES: dict[str, type[Family]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXl,
}
"""Families by the pipeline class in a base's model_index.json."""


def open_base(spec: ModelSpec, cache_dir: Path | None = None) -> Family:
    """Find the base model and return its family. Weights are read later, except those of a single file.

    Args:
        spec: the manifest's model.
        cache_dir: folder that all jobs share; a single-file base is converted to a folder in it.

    Raises:
        ConfigError: the base is missing, or its family is not supported.
        StorageError: the cache cannot be written.
    """
    if cache_dir is not None and Path(spec.base).is_file() and spec.base.endswith(SUFFIXES):
        formats = {name: family.single_file for name, family in FAMILIES.items() if family.single_file is not None}
        folder = convert(spec, cache_dir, formats)
    else:
        folder = find_folder(spec.base, spec.revision, "model.base")
    if not (folder / _INDEX).is_file():
        raise ConfigError(
            f"model.base: {folder} contains no {_INDEX}; write a folder in diffusers' layout or a hub id of one"
        )
    pipeline = read_json(folder / _INDEX).get("_class_name")
    if pipeline not in FAMILIES:
        raise ConfigError(
            f"model.base: {spec.base} is a {pipeline}, which is not supported; use one of {', '.join(FAMILIES)}"
        )
    vae_folder = folder / "vae" if spec.vae is None else find_folder(spec.vae, None, "model.vae")
    return FAMILIES[pipeline](folder, vae_folder, spec.variant)


def find_folder(name: str, revision: str | None, field: str) -> Path:
    """Return the local folder of a model; a hub id is downloaded to HF_HOME.

    Args:
        name: path of a folder, or hub id.
        revision: revision on the hub; None for the default branch.
        field: field of the manifest, for messages.

    Raises:
        ConfigError: the model does not exist or cannot be used.
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
    return _fetch(name, revision, field)


def _fetch(name: str, revision: str | None, field: str) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415  only hub ids need it
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_PATTERNS))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        summary = " ".join(str(error).split())[:200]
        at = f" at revision {revision}" if revision else ""
        raise ConfigError(f"{field}: cannot fetch {name}{at} from the hub: {summary}") from error


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
