"""Stable Diffusion 1.x and what is built like it: the UNet attends to one CLIP text encoder's last hidden states."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from finetune_trainer.errors import ConfigError
from finetune_trainer.models.noise_schedule import read_schedule

T = TypeVar("T")


class StableDiffusion:
    """A base model of this family; see `Family`."""

    def __init__(self, folder: Path, vae_folder: Path, variant: str | None) -> None:
        self._folder = folder
        self._vae_folder = vae_folder
        self._variant = variant
        vae = _config(vae_folder / "config.json")
        factor = 2 ** (len(vae.get("block_out_channels", [0])) - 1)
        self.schedule = read_schedule(_config(folder / "scheduler" / "scheduler_config.json"))
        self.latent_scale = float(vae.get("scaling_factor", 0.18215))
        self.latent_shape = (int(vae.get("latent_channels", 4)), factor, factor)

    def load_unet(self, dtype: torch.dtype) -> Any:
        """The UNet in `dtype`, on the CPU."""
        from diffusers import UNet2DConditionModel  # noqa: PLC0415  slow to import

        return self._load(
            "UNet",
            lambda options: UNet2DConditionModel.from_pretrained(
                self._folder, subfolder="unet", torch_dtype=dtype, **options
            ),
        )

    def load_image_encoder(self, device: torch.device) -> VaeEncoder:
        """The VAE in fp32."""
        from diffusers import AutoencoderKL  # noqa: PLC0415  slow to import

        vae = self._load(
            "VAE", lambda options: AutoencoderKL.from_pretrained(self._vae_folder, torch_dtype=torch.float32, **options)
        )
        return VaeEncoder(vae.to(device), self.latent_scale)

    def load_text_encoder(self, device: torch.device) -> ClipEncoder:
        """The text encoder in fp32."""
        from transformers import CLIPTextModel, CLIPTokenizer  # noqa: PLC0415  slow to import

        tokenizer = self._load("tokenizer", lambda _: CLIPTokenizer.from_pretrained(self._folder / "tokenizer"))
        model = self._load(
            "text encoder",
            lambda options: CLIPTextModel.from_pretrained(
                self._folder / "text_encoder", dtype=torch.float32, **options
            ),
        )
        return ClipEncoder(tokenizer, model.to(device))

    def image_encoder_files(self) -> list[Path]:
        """Files that the VAE's output depends on."""
        return _weights(self._vae_folder, self._variant)

    def text_encoder_files(self) -> list[Path]:
        """Files that the text encoder's output depends on."""
        tokenizer = sorted(path for path in (self._folder / "tokenizer").iterdir() if path.is_file())
        return [*_weights(self._folder / "text_encoder", self._variant), *tokenizer]

    def predict(self, unet: nn.Module, noisy: Tensor, timesteps: Tensor, text: Mapping[str, Tensor]) -> Tensor:
        """The UNet's answer (n, C, h, w) to noisy latents (n, C, h, w) at timesteps (n,)."""
        return cast(Tensor, unet(noisy, timesteps, encoder_hidden_states=text["hidden"], return_dict=False)[0])

    def _load(self, part: str, load: Callable[[dict[str, Any]], T]) -> T:
        """Read one part; what is wrong with it is the manifest's to mend."""
        try:
            return load({"variant": self._variant, "use_safetensors": True})
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            summary = " ".join(str(error).split())[:300]
            raise ConfigError(f"model.base: the {part} of {self._folder} cannot be read: {summary}") from error


class VaeEncoder:
    """The frozen VAE; see `ImageEncoder`."""

    def __init__(self, vae: Any, latent_scale: float) -> None:
        self._vae = vae.eval().requires_grad_(False)
        self._latent_scale = latent_scale

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the unscaled latents, each (n, C, h, w), of pixels (n, 3, H, W)."""
        posterior = self._vae.encode(pixels.to(self._vae.device)).latent_dist
        return posterior.mean, posterior.std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (n, 3, H, W) in [-1, 1] of scaled latents."""
        return cast(Tensor, self._vae.decode(latents.to(self._vae.device) / self._latent_scale).sample.clamp(-1, 1))


class ClipEncoder:
    """The frozen CLIP text encoder; see `TextEncoder`."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self._tokenizer = tokenizer
        self._model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Last hidden states (n, tokens, width) of captions, padded and cut to the encoder's length."""
        tokens = self._tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            max_length=self._model.config.max_position_embeddings,
            return_tensors="pt",
        )
        return {"hidden": self._model(tokens.input_ids.to(self._model.device)).last_hidden_state}


def _config(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"model.base: {path} cannot be read: {error}") from error


def _weights(folder: Path, variant: str | None) -> list[Path]:
    """Configuration and weights of one part, sorted."""
    suffix = ".safetensors" if variant is None else f".{variant}.safetensors"
    return sorted([folder / "config.json", *folder.glob(f"*{suffix}")])
