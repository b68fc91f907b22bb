"""SDXL (https://arxiv.org/abs/2307.01952): two text encoders, and a UNet that is conditioned on image size and crop."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from finetune_trainer.models import parts
from finetune_trainer.models.family import IMAGE_SIZES, SingleFile
from finetune_trainer.models.original_names import original_name
from finetune_trainer.models.stable_diffusion import StableDiffusion
from finetune_trainer.models.text import DualText, TextEncoder

_SECOND_ENCODER = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
"""A tensor of the second text encoder, with its name in SDXL's original code."""


class StableDiffusionXl(StableDiffusion):
    """A base model of this family; see `Family`."""

    single_file: ClassVar[SingleFile | None] = SingleFile(marker=_SECOND_ENCODER)
    _normalizes_latents: ClassVar[bool] = True

    def __init__(self, folder: Path, vae_folder: Path, variant: str | None) -> None:
        super().__init__(folder, vae_folder, variant)
        self._zero_empty = bool(parts.read_config(folder / "model_index.json").get("force_zeros_for_empty_prompt"))

    def load_text_encoder(self, device: torch.device, dtype: torch.dtype = torch.float32) -> TextEncoder:
        """Return both text encoders with their tokenizers, frozen."""
        self.before_encoders()
        first = self._text_part("text_encoder", "clip_l", device, dtype)
        second = self._text_part("text_encoder_2", "clip_g", device, dtype, projected=True)
        return DualText([first, second], self._zero_empty, self.text_settings)

    def load_tokenizers(self) -> list[Any]:
        """Return the tokenizers of all text encoders."""
        return [self._load_tokenizer("text_encoder"), self._load_tokenizer("text_encoder_2")]

    def text_encoder_files(self) -> list[Path]:
        """Return the files that determine the text encoders' output."""
        return [
            *self._text_files("text_encoder"),
            *self._text_files("text_encoder_2"),
            self._folder / "model_index.json",
        ]

    @property
    def kohya_base_version(self) -> str:
        """Version of the base in the metadata of kohya's files."""
        return "sdxl_base_v1-0"

    def conditions(self, text: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
        """Return the keyword arguments of the UNet and of a ControlNet.

        Sizes stay in fp32: bf16 cannot distinguish 1023 from 1024.
        """
        return {
            "encoder_hidden_states": text["hidden"].to(dtype),
            "added_cond_kwargs": {"text_embeds": text["pooled"].to(dtype), "time_ids": text[IMAGE_SIZES].float()},
        }

    @cached_property
    def _layers_per_block(self) -> int:
        return int(parts.read_config(self._folder / "unet" / "config.json").get("layers_per_block", 2))

    def kohya_name(self, part: str, module: str) -> str:
        """Return the name of an adapted module; those of the UNet follow SDXL's original code."""
        prefix = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[part]
        if part == self.denoiser_name:
            module = original_name(module, self._layers_per_block)
        return f"{prefix}_{module.replace('.', '_')}"
