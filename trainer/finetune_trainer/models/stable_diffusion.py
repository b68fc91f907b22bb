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

from finetune_trainer.errors import ConfigError
from finetune_trainer.models import parts
from finetune_trainer.models.direct import Proceed, read_module
from finetune_trainer.models.family import SingleFile
from finetune_trainer.models.latent_scaling import read_scaling
from finetune_trainer.models.layouts.folder import PipelineFolder
from finetune_trainer.models.noise_schedule import read_objective
from finetune_trainer.models.text import SingleText, TextEncoder, TextPart, in_dtype
from finetune_trainer.models.unet import UNetFamily


class StableDiffusion(UNetFamily):
    """A base model of this family; see `Family`."""

    single_file: ClassVar[SingleFile | None] = SingleFile(marker=None, options={"safety_checker": None})
    _normalizes_latents: ClassVar[bool] = False
    """Whether pipelines of the family apply the VAE's latents_mean and latents_std."""

    def __init__(self, folder: Path, vae_folder: Path, variant: str | None) -> None:
        self._folder = folder
        self._vae_folder = vae_folder
        self._variant = variant
        vae = parts.read_config(vae_folder / "config.json")
        index = parts.read_config(folder / "model_index.json")
        self.objective = read_objective(
            parts.read_config(folder / "scheduler" / "scheduler_config.json"), parts.class_of(index, "scheduler")
        )
        has_own_vae = vae_folder == folder / "vae"
        self._vae_field = "model.base" if has_own_vae else "model.vae"
        # A VAE from another place often has only default weights.
        self._vae_variant = variant if has_own_vae else parts.variant_in(vae_folder, variant)
        self.pipeline = PipelineFolder(folder, vae_folder, variant, self._vae_variant)
        self.latent_scaling = read_scaling(vae, self._vae_field, self._normalizes_latents)
        self.latent_channels = int(vae.get("latent_channels", 4))
        _check_channels(folder, self.latent_channels)
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

    def read_denoiser(self, dtype: torch.dtype, device: torch.device, proceed: Proceed) -> Any | None:
        """Return the UNet in `dtype` on the device; None if `load_denoiser` must load it, or if it is not needed."""
        from diffusers import UNet2DConditionModel  # noqa: PLC0415  slow to import

        folder = self._folder / "unet"
        files = parts.files_to_load(folder, self._variant)
        if not files:
            return None
        config = {**parts.read_config(folder / "config.json"), "_name_or_path": self._folder}
        return read_module(lambda: UNet2DConditionModel.from_config(config), files, dtype, device, proceed)

    def load_image_encoder(self, device: torch.device) -> parts.VaeEncoder:
        """Return the VAE in fp32."""
        self.before_encoders()
        from diffusers import AutoencoderKL  # noqa: PLC0415  slow to import

        vae = parts.load_part(
            self._vae_folder,
            self._vae_variant,
            "VAE",
            lambda options: AutoencoderKL.from_pretrained(self._vae_folder, torch_dtype=torch.float32, **options),
            self._vae_field,
        )
        return parts.VaeEncoder(vae.to(device), self.latent_scaling)

    def load_text_encoder(self, device: torch.device, dtype: torch.dtype = torch.float32) -> TextEncoder:
        """Return the text encoder with its tokenizer, frozen; on the meta device without weights."""
        self.before_encoders()
        return SingleText(self._text_part("text_encoder", "emb_params", device, dtype), self.text_settings)

    def load_tokenizers(self) -> list[Any]:
        """Return the tokenizers of all text encoders."""
        return [self._load_tokenizer("text_encoder")]

    def denoiser_files(self) -> list[Path]:
        """Return the files that determine the UNet's output."""
        return [
            *parts.weight_files(self._folder / "unet", self._variant),
            self._folder / "scheduler" / "scheduler_config.json",
        ]

    def image_encoder_files(self) -> list[Path]:
        """Return the files that determine the VAE's output."""
        return parts.weight_files(self._vae_folder, self._vae_variant)

    def text_encoder_files(self) -> list[Path]:
        """Return the files that determine the text encoder's output."""
        return self._text_files("text_encoder")

    @property
    def kohya_base_version(self) -> str:
        """Version of the base in the metadata of kohya's files."""
        # All bases of SD 2.x, and none of SD 1.x, have linear projections.
        is_second = parts.read_config(self._folder / "unet" / "config.json").get("use_linear_projection", False)
        return "sd_v2" if is_second else super().kohya_base_version

    def conditions(self, text: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
        """Return the keyword arguments of the UNet and of a ControlNet."""
        return {"encoder_hidden_states": text["hidden"].to(dtype)}

    def _text_part(
        self, name: str, webui_key: str, device: torch.device, dtype: torch.dtype, projected: bool = False
    ) -> TextPart:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection  # noqa: PLC0415  slow to import

        kind = CLIPTextModelWithProjection if projected else CLIPTextModel

        def load(options: dict[str, Any]) -> Any:
            if device.type == "meta":
                with device:
                    return kind(kind.config_class.from_pretrained(self._folder / name)).to(dtype)
            return kind.from_pretrained(self._folder / name, **in_dtype(dtype), **options, **parts.mapped_to(device))

        model = parts.load_part(self._folder, self._variant, "text encoder", load)
        return TextPart(name, self._load_tokenizer(name), model.to(device), webui_key)

    def _load_tokenizer(self, text_encoder: str) -> Any:
        from transformers import CLIPTokenizer  # noqa: PLC0415  slow to import

        folder = self._tokenizer_folder(text_encoder)
        return parts.load_part(self._folder, None, "tokenizer", lambda _: CLIPTokenizer.from_pretrained(folder))

    def _text_files(self, name: str) -> list[Path]:
        tokenizer = sorted(path for path in self._tokenizer_folder(name).iterdir() if path.is_file())
        return [*parts.weight_files(self._folder / name, self._variant), *tokenizer]

    def _tokenizer_folder(self, text_encoder: str) -> Path:
        return self._folder / text_encoder.replace("text_encoder", "tokenizer")


def _check_channels(folder: Path, latent_channels: int) -> None:
    """Check that the UNet maps noisy latents to a prediction of the same shape.

    Raises:
        ConfigError: it reads more than the latents (inpainting, editing), or predicts more (a variance).
    """
    config = parts.read_config(folder / "unet" / "config.json")
    for name in ("in_channels", "out_channels"):
        if int(config.get(name, 4)) != latent_channels:
            raise ConfigError(
                f"model.base: {name} of its UNet is {config.get(name, 4)}, and the latents of its VAE have "
                f"{latent_channels} channels; use a text-to-image base: bases for inpainting, editing or upscaling "
                "are not supported"
            )
