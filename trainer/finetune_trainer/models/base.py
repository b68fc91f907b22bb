"""Finding a base model: whatever the manifest names becomes one local folder in diffusers' layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune_contract.spec import ModelSpec
from finetune_trainer.errors import ConfigError
from finetune_trainer.models.family import Family
from finetune_trainer.models.single_file import SUFFIXES, convert
from finetune_trainer.models.stable_diffusion import StableDiffusion
from finetune_trainer.models.stable_diffusion_xl import StableDiffusionXl

_INDEX = "model_index.json"
_PATTERNS = ["*.json", "*.txt", "*.model", "*.safetensors"]
"""What is fetched of a hub repository: never pickles."""

FAMILIES: dict[str, type[Family]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXl,
}
"""Families by the pipeline class that a base's model_index.json names."""


def open_base(spec: ModelSpec, cache_dir: Path | None = None) -> Family:
    """Find the base model and tell its family; of a folder no weights are read yet.

    Args:
        spec: the manifest's model.
        cache_dir: folder that all jobs share, where a base that is a single file is turned into a folder.

    Raises:
        ConfigError: it is not there, or of no known family.
        StorageError: the cache cannot be written.
    """
    if cache_dir is not None and Path(spec.base).is_file() and spec.base.endswith(SUFFIXES):
        folder = convert(spec, cache_dir)
    else:
        folder = find_folder(spec.base, spec.revision, "model.base")
    if not (folder / _INDEX).is_file():
        raise ConfigError(f"model.base: {folder} holds no {_INDEX}; write a folder in diffusers' layout or a hub id")
    pipeline = read_json(folder / _INDEX).get("_class_name")
    if pipeline not in FAMILIES:
        raise ConfigError(
            f"model.base: {spec.base} is a {pipeline}, which is no known family; use one of {', '.join(FAMILIES)}"
        )
    vae_folder = folder / "vae" if spec.vae is None else find_folder(spec.vae, None, "model.vae")
    return FAMILIES[pipeline](folder, vae_folder, spec.variant)


def find_folder(name: str, revision: str | None, field: str) -> Path:
    """The local folder of a model: itself, or what is fetched from the hub into HF_HOME.

    Raises:
        ConfigError: it is not there.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.suffix in (".pt", ".bin"):
        raise ConfigError(f"{field}: {name} is a pickle, which can run code when it is read; convert it to safetensors")
    if path.is_file():
        raise ConfigError(f"{field}: {name} is a single file; write a folder in diffusers' layout or a hub id")
    if "://" in name:
        raise ConfigError(f"{field}: {name} cannot be read from there; write a folder or a hub id")
    if name.startswith(("/", "./", "../", "~")):
        raise ConfigError(f"{field}: there is no folder {name}; write one that the job's pods can see, or a hub id")
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
    """Read one of the base's JSON files.

    Raises:
        ConfigError: it is not there or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.base: {path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"model.base: {path} is not a JSON object")
    return value
