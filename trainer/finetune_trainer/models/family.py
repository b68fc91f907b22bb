"""What the methods and the data need of a base model, whichever family it is of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from finetune_trainer.models.noise_schedule import NoiseSchedule


class ImageEncoder(Protocol):
    """The frozen VAE."""

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the unscaled latents, each (n, C, h, w), of pixels (n, 3, H, W)."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (n, 3, H, W) in [-1, 1] of scaled latents."""
        ...


class TextEncoder(Protocol):
    """The frozen text encoder with its tokenizer."""

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """What the UNet takes of captions, by name; first dimension n."""
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

    def load_text_encoder(self, device: torch.device) -> TextEncoder:
        """The text encoder in fp32."""
        ...

    def image_encoder_files(self) -> list[Path]:
        """Files that the VAE's output depends on."""
        ...

    def text_encoder_files(self) -> list[Path]:
        """Files that the text encoder's output depends on."""
        ...

    def predict(self, unet: nn.Module, noisy: Tensor, timesteps: Tensor, text: Mapping[str, Tensor]) -> Tensor:
        """The UNet's answer (n, C, h, w) to noisy latents (n, C, h, w) at timesteps (n,)."""
        ...
