"""Reads and writes the parts of a base model in diffusers' layout. Called by the families."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from finetune_trainer import patience
from finetune_trainer.errors import ConfigError
from finetune_trainer.models.latent_scaling import LatentScaling
from finetune_trainer.models.text_names import copy_text_file
from finetune_trainer.transfers import to_device

T = TypeVar("T")
_INDEX = "model_index.json"
_SOURCE = "_name_or_path"
_WEIGHTS = ".safetensors"
"""Part of the names of weights and of their indexes."""
_KEPT = (".json", ".txt", ".model", ".safetensors")


class VaeEncoder:
    """The frozen VAE; see `ImageEncoder`."""

    def __init__(self, vae: Any, scaling: LatentScaling) -> None:
        # Convolutions are faster with channels last, on CPUs and on GPUs.
        self._vae = vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self._scaling = scaling

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the unscaled latents, each (n, C, h, w), of pixels (n, 3, H, W)."""
        posterior = self._vae.encode(to_device(pixels, self._vae.device)).latent_dist
        return posterior.mean.contiguous(), posterior.std.contiguous()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return the pixels (n, 3, H, W) in [-1, 1] of scaled latents."""
        unscaled = self._scaling.unscale(latents.to(self._vae.device))
        return cast(Tensor, self._vae.decode(unscaled).sample.clamp(-1, 1))


def load_part(
    folder: Path, variant: str | None, part: str, load: Callable[[dict[str, Any]], T], field: str = "model.base"
) -> T:
    """Read one part. Wait out a failing file system.

    Args:
        folder: the base's folder.
        variant: weight variant; None for the default weights.
        part: name of the part, for messages.
        load: reads the part with the given options of from_pretrained.
        field: the field of the manifest that names the folder.

    Raises:
        ConfigError: the part cannot be read; the user must change the manifest or the base.
        StorageOutageError: the file system fails.
    """
    options = {"variant": variant, "use_safetensors": True}
    try:
        return patience.wait_out(f"{field}: reading the {part} of {folder}", lambda: load(dict(options)))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        summary = " ".join(str(error).split())[:300]
        remedy = f"use a {'base' if field == 'model.base' else 'model'} with complete .safetensors weights"
        if variant is not None:
            remedy += f" of the variant {variant}, or leave model.variant out"
        raise ConfigError(f"{field}: the {part} of {folder} cannot be read: {summary}; {remedy}") from error


def mapped_to(device: torch.device) -> dict[str, Any]:
    """Return the options of from_pretrained that map weight files to a GPU, without a copy in host memory.

    On CPUs the weights are loaded as they have always been.
    """
    return {"device_map": {"": device}} if device.type == "cuda" else {}


def read_config(path: Path) -> dict[str, Any]:
    """Return a part's configuration.

    Raises:
        ConfigError: the file is missing or not JSON.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"model.base: {path} cannot be read: {error}; use a complete copy of the base") from error


def class_of(index: Mapping[str, Any], part: str) -> str | None:
    """Return the class of a part in a model_index.json; None if it has none."""
    entry = index.get(part)
    return str(entry[1]) if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None else None


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """Return the configuration and weight files of one part, sorted."""
    weights = folder.glob("*.safetensors")
    of_variant = [path for path in weights if variant is None or default_name(path.name, variant) != path.name]
    return sorted([folder / "config.json", *of_variant])


def files_to_load(folder: Path, variant: str | None) -> list[Path]:
    """Return the weight files that diffusers loads of one part: one file, or the numbered ones of an index.

    Returns:
        Nothing if diffusers has to find out itself, for example because of older names.
    """
    middle = "" if variant is None else f".{variant}"
    whole = folder / f"diffusion_pytorch_model{middle}{_WEIGHTS}"
    index = folder / f"diffusion_pytorch_model{_WEIGHTS}.index{middle}.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError):
            return []
        return sorted(folder / name for name in names)
    return [whole] if whole.is_file() else []


def default_name(name: str, variant: str) -> str:
    """Return the name that a file of a weight variant has among default weights; other names stay.

    Releases of diffusers and transformers differ in the place of the variant in the names of numbered files.
    """
    return re.sub(rf"\.{re.escape(variant)}(?=\.|-\d{{5}}-of-\d{{5}}\.)", "", name)


def variant_in(folder: Path, variant: str | None) -> str | None:
    """Return a weight variant if the folder of a part has it; None for the default weights."""
    return variant if variant is not None and any(folder.glob(f"*.{variant}*.safetensors")) else None


def remove_source_path(path: Path) -> None:
    """Remove from a configuration the path or hub id that the part was read from. It can be a path of this machine."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.pop(_SOURCE, None) is not None:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def copy_part(source: Path, target: Path, variant: str | None, is_text: bool) -> None:
    """Copy the folder of a part. The files of the copy do not have the variant in their names.

    Args:
        source: the part's folder.
        target: the folder to create.
        variant: weight variant of the part.
        is_text: whether it is a text encoder, whose names become portable.
    """
    copy: Callable[[Path, Path], object] = copy_text_file if is_text else shutil.copyfile
    target.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        name = path.name if variant is None else default_name(path.name, variant)
        is_other_variant = variant is not None and name == path.name and _WEIGHTS in name
        if is_copied(path) and not is_other_variant:
            copy(path, target / name)
            if variant is not None and _WEIGHTS in name and path.suffix == ".json":
                _rename_files(target / name, variant)


def is_copied(path: Path) -> bool:
    """Return whether a file of a part is a configuration, a vocabulary or safe weights."""
    return path.is_file() and path.suffix in _KEPT


def _rename_files(path: Path, variant: str) -> None:
    """Name the files in an index of numbered files without their variant."""
    index = json.loads(path.read_text(encoding="utf-8"))
    index["weight_map"] = {tensor: default_name(file, variant) for tensor, file in index["weight_map"].items()}
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
