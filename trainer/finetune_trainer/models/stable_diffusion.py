"""Stable Diffusion 1.x and 2.x: the UNet attends to the last hidden states of one CLIP text encoder.

The two differ only in their configuration: attention heads, width of the text embeddings, and a schedule that predicts
the noise or v.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from finetune_trainer.models import parts
from finetune_trainer.models.diffusion_objective import read_objective
from finetune_trainer.models.family import SingleFile
from finetune_trainer.models.text import SingleText, TextEncoder, TextPart
from finetune_trainer.models.unet import UNetFamily


class StableDiffusion(UNetFamily):
    """A base model of this family; see `Family`."""

    single_file: ClassVar[SingleFile | None] = SingleFile(marker=None, options={"safety_checker": None})

    def __init__(self, folder: Path, vae_folder: Path, variant: str | None) -> None:
        self._folder = folder
        self._vae_folder = vae_folder
        self._variant = variant
        vae = parts.read_config(vae_folder / "config.json")
        self.objective = read_objective(parts.read_config(folder / "scheduler" / "scheduler_config.json"))
        self.latent_scale = float(vae.get("scaling_factor", 0.18215))
        self.latent_channels = int(vae.get("latent_channels", 4))
        self.pixels_per_latent = 2 ** (len(vae.get("block_out_channels", [0])) - 1)

    def load_denoiser(self, dtype: torch.dtype) -> Any:
        """Return the UNet in `dtype`, on the CPU."""
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
        """Return the VAE in fp32."""
        from diffusers import AutoencoderKL  # noqa: PLC0415  slow to import

        vae = parts.load_part(
            self._folder,
            self._variant,
            "VAE",
            lambda options: AutoencoderKL.from_pretrained(self._vae_folder, torch_dtype=torch.float32, **options),
        )
        return parts.VaeEncoder(vae.to(device), self.latent_scale)

    def load_text_encoder(self, device: torch.device, dtype: torch.dtype = torch.float32) -> TextEncoder:
        """Return the text encoder with its tokenizer, frozen."""
        return SingleText(self._text_part("text_encoder", "emb_params", device, dtype))

    def denoiser_files(self) -> list[Path]:
        """Return the files that determine the UNet's output."""
        return [
            *parts.weight_files(self._folder / "unet", self._variant),
            self._folder / "scheduler" / "scheduler_config.json",
        ]

    def image_encoder_files(self) -> list[Path]:
        """Return the files that determine the VAE's output."""
        return parts.weight_files(self._vae_folder, self._variant)

    def text_encoder_files(self) -> list[Path]:
        """Return the files that determine the text encoder's output."""
        return self._text_files("text_encoder")

    def conditions(self, text: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
        """Return the keyword arguments of the UNet and of a ControlNet."""
        return {"encoder_hidden_states": text["hidden"].to(dtype)}

    def write_pipeline(self, folder: Path, trained: Mapping[str, Any]) -> list[Path]:
        """Write the complete pipeline in diffusers' layout."""
        return parts.write_pipeline(self._folder, self._vae_folder, self._variant, folder, trained)

    def _text_part(
        self, name: str, webui_key: str, device: torch.device, dtype: torch.dtype, projected: bool = False
    ) -> TextPart:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer  # noqa: PLC0415  slow

        kind = CLIPTextModelWithProjection if projected else CLIPTextModel
        tokenizer = parts.load_part(
            self._folder, None, "tokenizer", lambda _: CLIPTokenizer.from_pretrained(self._tokenizer_folder(name))
        )
        model = parts.load_part(
            self._folder,
            self._variant,
            "text encoder",
            lambda options: kind.from_pretrained(self._folder / name, dtype=dtype, **options),
        )
        return TextPart(name, tokenizer, model.to(device), webui_key)

    def _text_files(self, name: str) -> list[Path]:
        tokenizer = sorted(path for path in self._tokenizer_folder(name).iterdir() if path.is_file())
        return [*parts.weight_files(self._folder / name, self._variant), *tokenizer]

    def _tokenizer_folder(self, text_encoder: str) -> Path:
        return self._folder / text_encoder.replace("text_encoder", "tokenizer")
