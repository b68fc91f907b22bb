"""Common part of the families whose denoiser is a UNet of diffusers and whose latents are (channels, height, width)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finetune_trainer.models.latent_scaling import LatentScaling
from finetune_trainer.models.layouts.folder import PipelineFolder
from finetune_trainer.models.layouts.original import to_original
from finetune_trainer.models.text import TextSettings
from finetune_trainer.weights.lazy import LazyTensor


class UNetFamily:
    """UNet, latents and ControlNet of a family; see `Family`.

    Attributes:
        pipeline: the files of the base.
        text_settings: how captions become text conditions.
        latent_scaling: the map from the VAE's latents to the UNet's latents.
        latent_channels: number of channels of the latents.
        pixels_per_latent: number of pixels per latent along each side of an image.
        before_encoders: called before an encoder is loaded, to free memory.
    """

    denoiser_name: ClassVar[str] = "unet"
    compiled_blocks: ClassVar[frozenset[str]] = frozenset({"BasicTransformerBlock"})

    pipeline: PipelineFolder
    text_settings: TextSettings = TextSettings()
    latent_scaling: LatentScaling
    latent_channels: int
    pixels_per_latent: int
    before_encoders: Callable[[], None] = staticmethod(lambda: None)

    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        """Return channels, height and width of the latents of an image of this size in pixels."""
        return (self.latent_channels, height // self.pixels_per_latent, width // self.pixels_per_latent)

    def scale_latents(self, latents: Tensor) -> Tensor:
        """Return the UNet's latents for latents of the VAE."""
        return self.latent_scaling.scale(latents)

    def predict(self, denoiser: Any, noisy: Tensor, timesteps: Tensor, conditions: Mapping[str, Any]) -> Tensor:
        """Return the UNet's output for noisy latents (n, C, h, w) at timesteps (n,)."""
        prediction: Tensor = denoiser(noisy, timesteps, **conditions, return_dict=False)[0]
        return prediction

    def load_controlnet(self, denoiser: Any, folder: Path | None) -> Any:
        """Return a ControlNet (https://arxiv.org/abs/2302.05543), from a folder or from the encoder of the UNet."""
        from diffusers import ControlNetModel  # noqa: PLC0415  slow to import

        if folder is None:
            channels = _embedding_channels(self.pixels_per_latent)
            with _without_overwritten_init():
                return ControlNetModel.from_unet(denoiser, conditioning_embedding_out_channels=channels)
        return ControlNetModel.from_pretrained(folder, torch_dtype=torch.float32, use_safetensors=True)

    def control(
        self, controlnet: Any, noisy: Tensor, timesteps: Tensor, images: Tensor, conditions: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the residuals that the ControlNet adds to the UNet."""
        down, middle = controlnet(noisy, timesteps, controlnet_cond=images, return_dict=False, **conditions)
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}

    def to_original(self, tensors: Callable[[str], Mapping[str, LazyTensor]]) -> dict[str, LazyTensor]:
        """Return the tensors of a complete model by the names of the original code."""
        encoders = {name: tensors(name) for name, _ in self.pipeline.part_folders() if self.pipeline.is_text(name)}
        is_second = self.kohya_base_version == "sd_v2"
        return to_original(tensors("unet"), tensors("vae"), encoders, is_second=is_second)

    @property
    def kohya_base_version(self) -> str:
        """Version of the base in the metadata of kohya's files; that of SD 1.x if a family has no other."""
        return "sd_v1"

    def kohya_name(self, part: str, module: str) -> str:
        """Return the name of an adapted module in kohya's LoRA files, for a family with one text encoder."""
        prefix = "lora_unet" if part == self.denoiser_name else "lora_te"
        return f"{prefix}_{module.replace('.', '_')}"


@contextlib.contextmanager
def _without_overwritten_init() -> Iterator[None]:
    """Draw no random weights for the blocks of a ControlNet, which get the UNet's weights or zeros.

    They are a billion for SDXL. What is created before them, up to the encoder of conditioning images, draws as usual.
    """
    from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding  # noqa: PLC0415  slow to import

    has_drawn = False
    natives: dict[type, Callable[..., None]] = {
        kind: kind.reset_parameters for kind in (nn.Linear, nn.modules.conv._ConvNd)
    }
    embed = ControlNetConditioningEmbedding.__init__

    def embed_last(self: Any, *args: Any, **options: Any) -> None:
        nonlocal has_drawn
        embed(self, *args, **options)
        has_drawn = True

    def reset(module: Any) -> None:
        if not has_drawn:
            next(native for kind, native in natives.items() if isinstance(module, kind))(module)

    ControlNetConditioningEmbedding.__init__ = embed_last
    for kind in natives:
        kind.reset_parameters = reset  # type: ignore[attr-defined]
    try:
        yield
    finally:
        ControlNetConditioningEmbedding.__init__ = embed
        for kind, native in natives.items():
            kind.reset_parameters = native  # type: ignore[attr-defined]


def _embedding_channels(pixels_per_latent: int) -> tuple[int, ...]:
    """Return the channels of the encoder of conditioning images, 16 to 256; each level but the first halves the image.

    For 8 pixels per latent these are ControlNet's own four levels.
    """
    channels = (16, 32, 96, 256)
    levels = pixels_per_latent.bit_length()
    return channels[:levels] if levels <= len(channels) else channels + (channels[-1],) * (levels - len(channels))
