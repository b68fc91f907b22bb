"""Interface of a model family: everything that the methods and the data preparation need from a base model.

A family is a denoiser, an objective, latents and text conditions. The interface fixes neither the architecture of the
denoiser nor the shape of the latents nor the names of the conditions. To add a family, write one module with a class
that implements `Family`, and add one row to `base.FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from finetune_trainer.models.layouts.folder import PipelineFolder
from finetune_trainer.models.objective import Objective
from finetune_trainer.models.text import TextEncoder, TextSettings
from finetune_trainer.weights.lazy import LazyTensor

IMAGE_SIZES = "sizes"
"""Key of the image sizes in the text conditions of every batch, float32 (n, 6); see `micro_conditioning`."""


@dataclass(frozen=True)
class SingleFile:
    """Describes how to recognize and read a base of a family that is stored as one file.

    Attributes:
        marker: name of a tensor that only files of this family contain; None for files without any known marker.
        options: additional keyword arguments of the pipeline's from_single_file.
    """

    marker: str | None
    options: Mapping[str, Any] = field(default_factory=dict)


class ImageEncoder(Protocol):
    """The frozen VAE."""

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the unscaled latents, each (n, ...), of pixels (n, 3, H, W)."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Return the pixels (n, 3, H, W) in [-1, 1] of scaled latents."""
        ...


class Family(Protocol):
    """One opened base model. Each `load_*` call reads the weights from disk."""

    denoiser_name: ClassVar[str]
    """Folder of the denoiser in diffusers' layout. Also the prefix of its parameters in checkpoints and adapters."""
    compiled_blocks: ClassVar[frozenset[str]]
    """Class names of the repeated blocks that `training.compile` compiles."""
    single_file: ClassVar[SingleFile | None]
    """Format of single-file bases; None if the family has none."""

    text_settings: TextSettings
    """How captions become text conditions; set it before the text encoders are loaded."""
    pixels_per_latent: int
    """Number of pixels per latent along each side of an image."""

    def __init__(self, folder: Path, vae_folder: Path, variant: str | None) -> None: ...

    @property
    def pipeline(self) -> PipelineFolder:
        """The files of the base."""
        ...

    @property
    def objective(self) -> Objective:
        """The objective that the base was trained with, on the CPU."""
        ...

    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        """Return the shape of the latents of one image of this size in pixels."""
        ...

    def scale_latents(self, latents: Tensor) -> Tensor:
        """Return the denoiser's latents for latents of the VAE, (...) without a batch dimension."""
        ...

    def load_denoiser(self, dtype: torch.dtype) -> Any:
        """Return the denoiser in `dtype`, on the CPU: a torch module. Adapters need the mixins of diffusers."""
        ...

    def load_image_encoder(self, device: torch.device) -> ImageEncoder:
        """Return the VAE in fp32."""
        ...

    def load_text_encoder(self, device: torch.device, dtype: torch.dtype = torch.float32) -> TextEncoder:
        """Return all text encoders with their tokenizers, frozen."""
        ...

    def load_tokenizers(self) -> list[Any]:
        """Return the tokenizers of all text encoders."""
        ...

    def denoiser_files(self) -> list[Path]:
        """Return the files that determine the denoiser's output."""
        ...

    def image_encoder_files(self) -> list[Path]:
        """Return the files that determine the VAE's output."""
        ...

    def text_encoder_files(self) -> list[Path]:
        """Return the files that determine the text encoders' output."""
        ...

    def conditions(self, text: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
        """Return the keyword arguments of the denoiser for text conditions.

        Args:
            text: named tensors (n, ...): the output of the text encoder, and the sizes of the images as `IMAGE_SIZES`.
            dtype: number format of the forward pass.
        """
        ...

    def predict(self, denoiser: Any, noisy: Tensor, timesteps: Tensor, conditions: Mapping[str, Any]) -> Tensor:
        """Return the denoiser's output for noisy latents (n, ...) at timesteps (n,); the shape of the latents."""
        ...

    def load_controlnet(self, denoiser: Any, folder: Path | None) -> Any:
        """Return a ControlNet in fp32, read from a folder or, without one, initialized from the denoiser's weights.

        Raises:
            ConfigError: the family has no ControlNet.
            OSError, ValueError, KeyError, RuntimeError: the folder cannot be read.
        """
        ...

    def control(
        self, controlnet: Any, noisy: Tensor, timesteps: Tensor, images: Tensor, conditions: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the ControlNet's output as additional keyword arguments of the denoiser.

        Args:
            controlnet: the ControlNet.
            noisy: noisy latents, (n, ...).
            timesteps: int64 (n,).
            images: conditioning images, (n, 3, H, W) in [0, 1].
            conditions: what `conditions` returned.
        """
        ...

    @property
    def kohya_base_version(self) -> str:
        """Version of the base in the metadata of kohya's files, e.g. "sd_v1"."""
        ...

    def kohya_name(self, part: str, module: str) -> str:
        """Return the name of an adapted module in kohya's LoRA files.

        Args:
            part: `denoiser_name`, or the name of a text encoder.
            module: dotted name of the module within the part, as in diffusers or transformers.
        """
        ...

    def to_original(self, tensors: Callable[[str], Mapping[str, LazyTensor]]) -> dict[str, LazyTensor]:
        """Return the tensors of a complete model by the names of the original code, as single files have them.

        Args:
            tensors: returns the tensors of a part by its name.
        """
        ...
