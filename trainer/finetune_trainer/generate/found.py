"""Finds out what a path contains: a pipeline, a single file, a LoRA, an embedding, a ControlNet. Reads only headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from finetune_trainer.errors import ConfigError
from finetune_trainer.export.formats.compiled import FACTS
from finetune_trainer.export.formats.diffusers_folder import INDEX, LORA_NAME
from finetune_trainer.methods.embedding_file import SUFFIXES as EMBEDDING_SUFFIXES
from finetune_trainer.models.base import read_json
from finetune_trainer.models.layouts.original import CONTROL, UNET
from finetune_trainer.models.single_file import SUFFIXES
from finetune_trainer.weights.lazy import read_header

FLAG = "--model"
OPENVINO_FILE = "openvino_model.xml"
_LORA_MARKS = (".lora_A.", ".lora_B.", "lora_down.", "lora_up.", ".lora.down.", ".lora.up.", "lora_linear_layer.")
_EMBEDDING = "learned_embeds"
_CONTROLNET = "controlnet_cond_embedding."
_MAX_VECTORS_FILE = 4
"""Most tensors in a file of an embedding."""


class Kind(StrEnum):
    """What a path contains."""

    PIPELINE = "a pipeline"
    SINGLE_FILE = "a complete model"
    LORA = "a LoRA"
    EMBEDDING = "an embedding"
    CONTROLNET = "a ControlNet"
    OPENVINO = "a pipeline for OpenVINO"
    COMPILED = "a pipeline with a compiled denoiser"


IS_COMPLETE = (Kind.PIPELINE, Kind.SINGLE_FILE, Kind.OPENVINO, Kind.COMPILED)
HAS_STRENGTH = (Kind.LORA, Kind.CONTROLNET)


@dataclass(frozen=True)
class FoundModel:
    """What a path contains.

    Attributes:
        kind: what it is.
        path: its folder or file.
        base: folder of its base if that is next to it; None if the base is elsewhere, or if it needs none.
    """

    kind: Kind
    path: Path
    base: Path | None = None


def find(path: Path, name: str | None = None) -> FoundModel:
    """Return what a path contains.

    Args:
        path: a folder or file.
        name: name of the job that wrote it; selects a file in a folder with files of several jobs.

    Raises:
        ConfigError: nothing that can draw.
    """
    if path.is_file():
        return FoundModel(_kind_of_file(path), path)
    if not path.is_dir():
        raise ConfigError(f"{FLAG}: {path} does not exist; write the path of a folder or file that a job has written")
    embedding = next(iter(sorted(path.glob(f"{_EMBEDDING}.*"))), None)
    if (path / INDEX).is_file():
        return _pipeline(path, embedding)
    if embedding is not None:
        return FoundModel(Kind.EMBEDDING, path)
    if (path / "config.json").is_file() and read_json(path / "config.json").get("_class_name") == "ControlNetModel":
        return FoundModel(Kind.CONTROLNET, path)
    return find(_only_file(path, name))


def _pipeline(path: Path, embedding: Path | None) -> FoundModel:
    """Return what is in a folder with a pipeline: the pipeline, or something next to its base (`full: true`)."""
    if any(path.glob(f"*/{OPENVINO_FILE}")):
        return FoundModel(Kind.OPENVINO, path)
    if (path / FACTS).is_file():
        return FoundModel(Kind.COMPILED, path)
    if embedding is not None:
        return FoundModel(Kind.EMBEDDING, path, path)
    if (path / LORA_NAME).is_file():
        return FoundModel(Kind.LORA, path / LORA_NAME, path)
    if "ControlNet" in str(read_json(path / INDEX).get("_class_name")):
        return FoundModel(Kind.CONTROLNET, path / "controlnet", path)
    return FoundModel(Kind.PIPELINE, path)


def _only_file(folder: Path, name: str | None) -> Path:
    """Return the file of a folder that is meant: that of the job, diffusers' LoRA, or the only one."""
    files = [each for each in sorted(folder.iterdir()) if each.suffix in SUFFIXES and each.is_file()]
    for stem in (name, Path(LORA_NAME).stem):
        if chosen := [each for each in files if each.stem == stem]:
            return chosen[0]
    if len(files) == 1:
        return files[0]
    names = ", ".join(each.name for each in files[:10])
    if not files:
        raise ConfigError(
            f"{FLAG}: {folder} contains neither a pipeline nor a LoRA, an embedding, a ControlNet or a single file; "
            "write the path of an output"
        )
    raise ConfigError(f"{FLAG}: {folder} contains {len(files)} models ({names}); write the path of one of them")


def _kind_of_file(path: Path) -> Kind:
    if path.suffix == ".safetensors":
        try:
            header, _, _ = read_header(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{FLAG}: {path} cannot be read ({error}); write a complete .safetensors file") from error
        if (kind := kind_of_tensors(header)) is not None:
            return kind
        raise ConfigError(
            f"{FLAG}: {path} contains neither a complete model nor a LoRA, an embedding or a ControlNet; for a part of "
            "a pipeline, write the folder of the pipeline"
        )
    if path.suffix in SUFFIXES:
        return Kind.SINGLE_FILE
    if path.suffix in EMBEDDING_SUFFIXES:
        return Kind.EMBEDDING
    raise ConfigError(f"{FLAG}: {path} is no model; write a .safetensors or .ckpt file, or the folder of a pipeline")


def kind_of_tensors(header: Mapping[str, Mapping[str, Any]]) -> Kind | None:
    """Return what a file with these tensors is; None if it is nothing that can draw."""
    if any(name.startswith(UNET) for name in header):
        return Kind.SINGLE_FILE
    if any(mark in name for name in header for mark in _LORA_MARKS):
        return Kind.LORA
    if any(name.startswith((CONTROL, _CONTROLNET)) for name in header):
        return Kind.CONTROLNET
    shapes = [entry["shape"] for entry in header.values()]
    if 0 < len(shapes) <= _MAX_VECTORS_FILE and all(len(shape) in (1, 2) for shape in shapes):
        return Kind.EMBEDDING
    return None
