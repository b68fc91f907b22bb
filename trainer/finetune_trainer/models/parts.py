"""Reads and writes the parts of a base model in diffusers' layout. Called by the families."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from finetune_trainer.errors import ConfigError

T = TypeVar("T")
_INDEX = "model_index.json"
_KEPT = (".json", ".txt", ".model", ".safetensors")


class VaeEncoder:
    """The frozen VAE; see `ImageEncoder`."""

    def __init__(self, vae: Any, latent_scale: float) -> None:
        # Convolutions are faster with channels last, on CPUs and on GPUs.
        self._vae = vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self._latent_scale = latent_scale

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the unscaled latents, each (n, C, h, w), of pixels (n, 3, H, W)."""
        posterior = self._vae.encode(pixels.to(self._vae.device)).latent_dist
        return posterior.mean.contiguous(), posterior.std.contiguous()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return the pixels (n, 3, H, W) in [-1, 1] of scaled latents."""
        return cast(Tensor, self._vae.decode(latents.to(self._vae.device) / self._latent_scale).sample.clamp(-1, 1))


def load_part(folder: Path, variant: str | None, part: str, load: Callable[[dict[str, Any]], T]) -> T:
    """Read one part.

    Args:
        folder: the base's folder.
        variant: weight variant; None for the default weights.
        part: name of the part, for messages.
        load: reads the part with the given options of from_pretrained.

    Raises:
        ConfigError: the part cannot be read; the user must change the manifest or the base.
    """
    try:
        return load({"variant": variant, "use_safetensors": True})
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        summary = " ".join(str(error).split())[:300]
        remedy = "use a base with complete .safetensors weights"
        if variant is not None:
            remedy += f" of the variant {variant}, or leave model.variant out"
        raise ConfigError(f"model.base: the {part} of {folder} cannot be read: {summary}; {remedy}") from error


def read_config(path: Path) -> dict[str, Any]:
    """Return a part's configuration.

    Raises:
        ConfigError: the file is missing or not JSON.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"model.base: {path} cannot be read: {error}; use a complete copy of the base") from error


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """Return the configuration and weight files of one part, sorted."""
    suffix = ".safetensors" if variant is None else f".{variant}.safetensors"
    return sorted([folder / "config.json", *folder.glob(f"*{suffix}")])


def write_pipeline(base: Path, vae: Path, variant: str | None, folder: Path, trained: Mapping[str, Any]) -> list[Path]:
    """Write a pipeline: the trained modules, and copies of the base's other parts.

    Args:
        base: the base's folder.
        vae: folder of the VAE in use.
        variant: weight variant of the base. The files of the copies do not have it in their names.
        folder: target folder, empty.
        trained: modules by the names of their folders.

    Returns:
        The files written.
    """
    for part, value in read_config(base / _INDEX).items():
        if part.startswith("_") or not isinstance(value, list) or value[0] is None:
            continue
        source = vae if part == "vae" else base / part
        if part in trained:
            _save_module(trained[part], folder / part)
        elif source.is_dir():
            _copy_part(source, folder / part, variant)
    shutil.copyfile(base / _INDEX, folder / _INDEX)
    return [path for path in folder.rglob("*") if path.is_file()]


def _save_module(module: Any, folder: Path) -> None:
    """Write a module as diffusers and transformers do, but without the local path that the base was read from."""
    if hasattr(module, "register_to_config"):
        module.register_to_config(_name_or_path="")
    else:
        module.config._name_or_path = ""
    module.save_pretrained(folder)


def _copy_part(source: Path, target: Path, variant: str | None) -> None:
    target.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        is_other_variant = path.suffix == ".safetensors" and variant is not None and f".{variant}." not in path.name
        if path.is_file() and path.suffix in _KEPT and not is_other_variant:
            name = path.name if variant is None else path.name.replace(f".{variant}.", ".")
            shutil.copyfile(path, target / name)
