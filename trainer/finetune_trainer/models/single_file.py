"""Bases that are one file, as the web UIs keep them: turned once into a folder in diffusers' layout, in the cache.

A `.ckpt` is a pickle. It is read by torch's reader of weights alone, which refuses whatever else a pickle may hold.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch

from finetune_contract.spec import ModelSpec
from finetune_trainer.errors import ConfigError, StorageError

SUFFIXES = (".safetensors", ".ckpt")
_XL_KEY = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
"""A tensor of SDXL's second text encoder, as its original code names it."""
_INDEX = "model_index.json"


def convert(spec: ModelSpec, cache_dir: Path) -> Path:
    """The folder that a single-file base is turned into; what an earlier job has turned is taken as it is.

    Args:
        spec: the manifest's model, whose base is a file.
        cache_dir: folder that all jobs share.

    Raises:
        ConfigError: the file, or the configuration for it, cannot be read.
        StorageError: the folder cannot be written.
    """
    file = Path(spec.base)
    stat = file.stat()
    # Not by content: reading gigabytes at each start only to know them again would take as long as turning them.
    about = f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns} {spec.config}"
    key = hashlib.sha256(about.encode()).hexdigest()[:32]
    folder = cache_dir / "bases" / key
    if (folder / _INDEX).is_file():
        return folder
    pipeline = _read(file, spec.config)
    aside = folder.with_name(f".{key}.{secrets.token_hex(4)}.writing")
    try:
        pipeline.save_pretrained(aside, safe_serialization=True)
        # Another rank, or another job, may have been faster.
        with contextlib.suppress(OSError):
            aside.rename(folder)
    except OSError as error:
        raise StorageError(f"cache: cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _read(file: Path, config: str | None) -> Any:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline  # noqa: PLC0415  slow to import

    kind = StableDiffusionXLPipeline if _is_xl(file) else StableDiffusionPipeline
    options = {} if kind is StableDiffusionXLPipeline else {"safety_checker": None}
    try:
        return kind.from_single_file(str(file), config=config, torch_dtype=torch.float32, **options)
    except Exception as error:
        # The reader raises whatever its many steps do, and whatever it is, this file cannot be used.
        summary = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"model.base: {file} cannot be read as a single-file checkpoint: {summary}; where the hub is not "
            "reachable, name a folder with the base's configuration in model.config"
        ) from error


def _is_xl(file: Path) -> bool:
    """Whether the file is of SDXL.

    Raises:
        ConfigError: it is not what its name says, or holds more than weights.
    """
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415  only single files need it

    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                return _XL_KEY in tensors.keys()  # noqa: SIM118  it is no mapping
        state = torch.load(file, map_location="meta", weights_only=True, mmap=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError) as error:
        raise ConfigError(f"model.base: {file} is no checkpoint: {' '.join(str(error).split())[:200]}") from error
    except Exception as error:
        # pickle's own error: something in it is not a weight.
        raise ConfigError(
            f"model.base: {file} holds more than weights, which could run code when it is read; use a .safetensors"
        ) from error
    return _XL_KEY in state.get("state_dict", state)
