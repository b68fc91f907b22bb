"""Stable Diffusion 1.x and 2.x: the UNet attends to one CLIP text encoder's last hidden states.

The two differ in what their configuration says: heads, width of the text, and a schedule that asks for the noise or
for v.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune_trainer.models import parts
from finetune_trainer.models.noise_schedule import read_schedule
from finetune_trainer.models.text import SingleText, TextEncoder, TextPart


class StableDiffusion:
    """A base model of this family; see `Family`."""

    def __init__(self, folder: Path, vae_folder: Path, variant: str | None) -> None:
        self._folder = folder
        self._vae_folder = vae_folder
        self._variant = variant
        vae = parts.read_config(vae_folder / "config.json")
        factor = 2 ** (len(vae.get("block_out_channels", [0])) - 1)
        self.schedule = read_schedule(parts.read_config(folder / "scheduler" / "scheduler_config.json"))
        self.latent_scale = float(vae.get("scaling_factor", 0.18215))
        self.latent_shape = (int(vae.get("latent_channels", 4)), factor, factor)

    def load_unet(self, dtype: torch.dtype) -> Any:
        """The UNet in `dtype`, on the CPU."""
        from diffusers import UNet2DConditionModel  # noqa: PLC0415  slow to import

        return parts.load_part(
            self._folder,
            self._variant,
            "UNet",
            lambda options: UNet2DConditionModel.from_pretrained(
                self._folder, subfolder="unet", torch_dtype=dtype, **options
            ),
        )

    def load_image_encoder(self, device: torch.device) -> parts.VaeEncoder:
        """The VAE in fp32."""
        from diffusers import AutoencoderKL  # noqa: PLC0415  slow to import

        vae = parts.load_part(
            self._folder,
            self._variant,
            "VAE",
            lambda options: AutoencoderKL.from_pretrained(self._vae_folder, torch_dtype=torch.float32, **options),
        )
        return parts.VaeEncoder(vae.to(device), self.latent_scale)

    def load_text_encoder(self, device: torch.device, dtype: torch.dtype = torch.float32) -> TextEncoder:
        """The text encoder with its tokenizer, frozen."""
        return SingleText(self._text_part("text_encoder", "tokenizer", device, dtype))

    def image_encoder_files(self) -> list[Path]:
        """Files that the VAE's output depends on."""
        return parts.weight_files(self._vae_folder, self._variant)

    def text_encoder_files(self) -> list[Path]:
        """Files that the text encoder's output depends on."""
        return self._text_files("text_encoder", "tokenizer")

    def unet_files(self) -> list[Path]:
        """Files that the UNet's output depends on."""
        return [
            *parts.weight_files(self._folder / "unet", self._variant),
            self._folder / "scheduler" / "scheduler_config.json",
        ]

    def conditions(self, text: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
        """Keyword arguments of the UNet and of a ControlNet."""
        return {"encoder_hidden_states": text["hidden"].to(dtype)}

    def write_pipeline(self, folder: Path, trained: Mapping[str, Any]) -> list[Path]:
        """Write the whole pipeline in diffusers' layout."""
        return parts.write_pipeline(self._folder, self._vae_folder, self._variant, folder, trained)

    def _text_part(
        self, name: str, tokenizer_name: str, device: torch.device, dtype: torch.dtype, projected: bool = False
    ) -> TextPart:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer  # noqa: PLC0415  slow

        kind = CLIPTextModelWithProjection if projected else CLIPTextModel
        tokenizer = parts.load_part(
            self._folder, None, "tokenizer", lambda _: CLIPTokenizer.from_pretrained(self._folder / tokenizer_name)
        )
        model = parts.load_part(
            self._folder,
            self._variant,
            "text encoder",
            lambda options: kind.from_pretrained(self._folder / name, dtype=dtype, **options),
        )
        return TextPart(name, tokenizer, model.to(device))

    def _text_files(self, name: str, tokenizer_name: str) -> list[Path]:
        tokenizer = sorted(path for path in (self._folder / tokenizer_name).iterdir() if path.is_file())
        return [*parts.weight_files(self._folder / name, self._variant), *tokenizer]
