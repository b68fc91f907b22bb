"""SDXL (https://arxiv.org/abs/2307.01952): two text encoders, and a UNet that is told the image's size and crop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune_trainer.models import parts
from finetune_trainer.models.stable_diffusion import StableDiffusion
from finetune_trainer.models.text import DualText, TextEncoder


class StableDiffusionXl(StableDiffusion):
    """A base model of this family; see `Family`."""

    def __init__(self, folder: Path, vae_folder: Path, variant: str | None) -> None:
        super().__init__(folder, vae_folder, variant)
        self._zero_empty = bool(parts.read_config(folder / "model_index.json").get("force_zeros_for_empty_prompt"))

    def load_text_encoder(self, device: torch.device, dtype: torch.dtype = torch.float32) -> TextEncoder:
        """Both text encoders with their tokenizers, frozen."""
        first = self._text_part("text_encoder", "tokenizer", device, dtype)
        second = self._text_part("text_encoder_2", "tokenizer_2", device, dtype, projected=True)
        return DualText([first, second], self._zero_empty)

    def text_encoder_files(self) -> list[Path]:
        """Files that the text encoders' output depends on."""
        return [
            *self._text_files("text_encoder", "tokenizer"),
            *self._text_files("text_encoder_2", "tokenizer_2"),
            self._folder / "model_index.json",
        ]

    def conditions(self, text: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
        """Keyword arguments of the UNet and of a ControlNet. Sizes stay in fp32: bf16 cannot tell 1023 from 1024."""
        return {
            "encoder_hidden_states": text["hidden"].to(dtype),
            "added_cond_kwargs": {"text_embeds": text["pooled"].to(dtype), "time_ids": text["sizes"].float()},
        }
