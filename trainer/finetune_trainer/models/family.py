"""What the methods and the data need of a base model, whichever family it is of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from finetune_trainer.models.noise_schedule import NoiseSchedule
from finetune_trainer.models.text import TextEncoder


class ImageEncoder(Protocol):
    """The frozen VAE."""

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the unscaled latents, each (n, C, h, w), of pixels (n, 3, H, W)."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (n, 3, H, W) in [-1, 1] of scaled latents."""
        ...


class Family(Protocol):
    """One opened base model. Parts are read when they are asked for, and each call reads them anew."""

    def __init__(self, folder: Path, vae_folder: Path, variant: str | None) -> None: ...

    schedule: NoiseSchedule
    """The noise schedule that it was trained with."""
    latent_scale: float
    """Factor from the VAE's latents to the UNet's."""
    latent_shape: tuple[int, int, int]
    """Channels of the latents, and pixels per latent in height and width."""

    def load_unet(self, dtype: torch.dtype) -> Any:
        """The UNet in `dtype`, on the CPU: a module with the mixins of diffusers, which has no types."""
        ...

    def load_image_encoder(self, device: torch.device) -> ImageEncoder:
        """The VAE in fp32."""
        ...

    def load_text_encoder(self, device: torch.device, dtype: torch.dtype = torch.float32) -> TextEncoder:
        """All text encoders with their tokenizers, frozen."""
        ...

    def image_encoder_files(self) -> list[Path]:
        """Files that the VAE's output depends on."""
        ...

    def text_encoder_files(self) -> list[Path]:
        """Files that the text encoders' output depends on."""
        ...

    def unet_files(self) -> list[Path]:
        """Files that the UNet's output depends on."""
        ...

    def conditions(self, text: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
        """Keyword arguments, of the UNet and of a ControlNet alike, that tell it the text and the image's size."""
        ...

    def write_pipeline(self, folder: Path, trained: Mapping[str, Any]) -> list[Path]:
        """Write the whole pipeline in diffusers' layout: trained modules by the names of their folders, the rest as is.

        Returns:
            The files written.
        """
        ...
