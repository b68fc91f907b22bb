"""A pipeline folder in diffusers' layout whose tensors are read in pieces. Called by the families and the exports."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune_trainer.errors import ConfigError
from finetune_trainer.models.parts import class_of, read_config, variant_in
from finetune_trainer.models.text_names import portable_text_name
from finetune_trainer.weights.lazy import LazyTensor, read_files

_STEMS = ("diffusion_pytorch_model", "model")
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names of a VAE's attention layers in bases that older releases of diffusers wrote."""


@dataclass(frozen=True)
class PipelineFolder:
    """A pipeline in diffusers' layout.

    Attributes:
        folder: its folder.
        vae: folder of the VAE in use.
        variant: weight variant; None for the default weights.
        vae_variant: that of the VAE.
    """

    folder: Path
    vae: Path
    variant: str | None = None
    vae_variant: str | None = None

    @cached_property
    def index(self) -> dict[str, Any]:
        """Return the content of its model_index.json."""
        return read_config(self.folder / "model_index.json")

    @cached_property
    def scheduler(self) -> dict[str, Any]:
        """Return the configuration of its scheduler."""
        return read_config(self.folder / "scheduler" / "scheduler_config.json")

    @property
    def predicts_v(self) -> bool:
        """Return whether the denoiser predicts v instead of the noise."""
        return self.scheduler.get("prediction_type") == "v_prediction"

    @property
    def has_zero_snr(self) -> bool:
        """Return whether the last timestep has no signal."""
        return bool(self.scheduler.get("rescale_betas_zero_snr"))

    def part_folders(self) -> Iterator[tuple[str, Path]]:
        """Yield the name and the folder of each part that exists."""
        for part, value in self.index.items():
            if not part.startswith("_") and isinstance(value, list) and value[0] is not None:
                source = self.vae if part == "vae" else self.folder / part
                if source.is_dir():
                    yield part, source

    def variant_of(self, part: str, source: Path) -> str | None:
        """Return the weight variant of a part."""
        return self.vae_variant if part == "vae" else variant_in(source, self.variant)

    def is_text(self, part: str) -> bool:
        """Return whether a part is a CLIP text encoder."""
        return (class_of(self.index, part) or "").startswith("CLIPText")

    def has_weights(self, part: str) -> bool:
        """Return whether a part has weights."""
        return any(self.source(part).glob("*.safetensors"))

    def source(self, part: str) -> Path:
        """Return the folder of a part."""
        return self.vae if part == "vae" else self.folder / part

    def config(self, part: str) -> dict[str, Any]:
        """Return the configuration of a part."""
        return read_config(self.source(part) / "config.json")

    def tensors(self, part: str) -> dict[str, LazyTensor]:
        """Return the tensors of a part by the names that current releases of diffusers and transformers read.

        Raises:
            ConfigError: it has no readable weights.
        """
        source = self.source(part)
        return rename(read_part(source, self.variant_of(part, source)), part, is_text=self.is_text(part))


def read_part(folder: Path, variant: str | None, field: str = "model.base") -> dict[str, LazyTensor]:
    """Return the tensors of the folder of one part; their values are read later.

    Raises:
        ConfigError: it has no readable weights.
    """
    try:
        if files := part_files(folder, variant):
            return read_files(files)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{field}: the weights in {folder} cannot be read: {error}; use a complete copy of the base"
        ) from error
    of_variant = f" of the variant {variant}" if variant else ""
    raise ConfigError(f"{field}: {folder} has no .safetensors weights{of_variant}; use a base that has them")


def part_files(folder: Path, variant: str | None) -> list[Path]:
    """Return the weight files of one part: one file, or the numbered ones of an index; none if there are none."""
    middle = "" if variant is None else f".{variant}"
    for stem in _STEMS:
        for index in (f"{stem}.safetensors.index{middle}.json", f"{stem}{middle}.safetensors.index.json"):
            if (folder / index).is_file():
                content = json.loads((folder / index).read_text(encoding="utf-8"))
                return sorted(folder / name for name in set(content["weight_map"].values()))
        if (folder / f"{stem}{middle}.safetensors").is_file():
            return [folder / f"{stem}{middle}.safetensors"]
    return []


def rename(tensors: Mapping[str, LazyTensor], part: str, *, is_text: bool) -> dict[str, LazyTensor]:
    """Return the tensors of a part by current names."""
    if is_text:
        # A buffer that older releases stored; its values are the positions.
        kept = {name: value for name, value in tensors.items() if not name.endswith("position_ids")}
        return {portable_text_name(name): value for name, value in kept.items()}
    if part == "vae":
        return dict(_current_attention(name, value) for name, value in tensors.items())
    return dict(tensors)


def _current_attention(name: str, value: LazyTensor) -> tuple[str, LazyTensor]:
    match = re.fullmatch(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)", name)
    if match is not None:
        name = f"{match[1]}.{_OLD_ATTENTION[match[2]]}.{match[3]}"
    if ".attentions." in name and len(value.shape) == 4:
        value = value.reshape(*value.shape[:2])
    return name, value
