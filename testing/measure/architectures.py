"""Bases with random weights in the architectures of SD 1.5 and SDXL, and a tiny one. Called by `bench.train`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from finetune_trainer.models.family import IMAGE_SIZES, SingleFile
from finetune_trainer.models.latent_scaling import LatentScaling
from finetune_trainer.models.layouts.folder import PipelineFolder
from finetune_trainer.models.noise_schedule import read_objective
from finetune_trainer.models.parts import VaeEncoder
from finetune_trainer.models.text import DualText, SingleText, TextEncoder, TextPart
from finetune_trainer.models.unet import UNetFamily

NUM_TOKENS = 77
VOCABULARY = 49408
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
_TILE = 1 << 20

UNETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "norm_num_groups": 4,
    },
    "sd15": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}


class RandomPipeline(PipelineFolder):
    """The files of a base with random weights: none."""

    @cached_property
    def index(self) -> dict[str, Any]:
        """Return no parts."""
        return {}


class RandomFamily(UNetFamily):
    """A base with random weights; see `finetune_trainer.models.family.Family`."""

    single_file: ClassVar[SingleFile | None] = None

    def __init__(self, name: str, weights_on: torch.device | None = None) -> None:
        """Describe the base.

        Args:
            name: one of UNETS.
            weights_on: device to make the weights on; default: the CPU.
        """
        self.name = name
        self.weights_on = weights_on or torch.device("cpu")
        self.objective = read_objective(SCHEDULE)
        self.pipeline = RandomPipeline(Path(), Path())
        self.latent_scaling = LatentScaling(0.18215)
        self.latent_channels = 4
        self.pixels_per_latent = 8

    def load_denoiser(self, dtype: torch.dtype) -> Any:
        """Return the UNet."""
        return make(lambda: UNet2DConditionModel(**UNETS[self.name]), dtype, self.weights_on)

    def load_vae(self, dtype: torch.dtype) -> Any:
        """Return the VAE."""
        channels = (8, 8, 8, 8) if self.name == "tiny" else (128, 256, 512, 512)
        return make(
            lambda: AutoencoderKL(
                block_out_channels=channels,
                norm_num_groups=4 if self.name == "tiny" else 32,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
            ),
            dtype,
            self.weights_on,
        )

    def load_image_encoder(self, device: torch.device) -> VaeEncoder:
        """Return the VAE in fp32."""
        return VaeEncoder(self.load_vae(torch.float32).to(device), self.latent_scaling)

    def load_text_encoder(self, device: torch.device, dtype: torch.dtype = torch.float32) -> TextEncoder:
        """Return the text encoders."""
        config = {"vocab_size": VOCABULARY, "max_position_embeddings": NUM_TOKENS, "eos_token_id": VOCABULARY - 1}
        clip_l = _CLIP_L | ({"num_hidden_layers": 1} if self.name == "tiny" else {})
        first = make(lambda: CLIPTextModel(CLIPTextConfig(**config, **clip_l)), dtype, self.weights_on).to(device)
        parts = [TextPart("text_encoder", tokenizer(), first, "clip_l")]
        if self.name != "sdxl":
            return SingleText(parts[0])
        large = CLIPTextConfig(**config, **_CLIP_G)
        second = make(lambda: CLIPTextModelWithProjection(large), dtype, self.weights_on).to(device)
        return DualText([*parts, TextPart("text_encoder_2", tokenizer(), second, "clip_g")], True)

    def load_tokenizers(self) -> list[Any]:
        """Return the tokenizers."""
        return [tokenizer()]

    def image_encoder_files(self) -> list[Path]:
        """Return no files: the weights are not read from disk."""
        return []

    def text_encoder_files(self) -> list[Path]:
        """Return no files: the weights are not read from disk."""
        return []

    def denoiser_files(self) -> list[Path]:
        """Return no files: the weights are not read from disk."""
        return []

    def conditions(self, text: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
        """Return the keyword arguments of the UNet and of a ControlNet."""
        hidden = {"encoder_hidden_states": text["hidden"].to(dtype)}
        if self.name != "sdxl":
            return hidden
        return {**hidden, "added_cond_kwargs": {"text_embeds": text["pooled"].to(dtype), "time_ids": text[IMAGE_SIZES]}}


def make(build: Callable[[], Any], dtype: torch.dtype, device: torch.device | None = None) -> Any:
    """Return a module with small random weights on a device; default: the CPU.

    One tile of random numbers is repeated, because drawing billions of numbers takes minutes.
    """
    with torch.device("meta"):
        module: nn.Module = build()
    module = module.to(dtype).to_empty(device=device or "cpu")
    tile = torch.randn(_TILE, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype).to(device or "cpu")
    for name, parameter in module.named_parameters():
        flat = parameter.data.view(-1)
        for start in range(0, len(flat), _TILE):
            flat[start : start + _TILE] = tile[: len(flat) - start]
        if "norm" in name and name.endswith("weight"):
            parameter.data.fill_(1.0)
    # The constructor computes buffers, and on the meta device they have no values: set them here.
    for name, buffer in module.named_buffers():
        assert name.endswith("position_ids"), name
        buffer.copy_(torch.arange(buffer.shape[-1], device=buffer.device).expand_as(buffer))
    return module


@cache
def _tokenizer_folder() -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory()
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += [f"filler{number}" for number in range(VOCABULARY - len(tokens) - 2)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    path = Path(folder.name)
    (path / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    names = {"bos_token": tokens[-2], "eos_token": tokens[-1], "pad_token": tokens[-1], "unk_token": tokens[-1]}
    (path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": NUM_TOKENS, **names}))
    return folder


def tokenizer() -> Any:
    """Return a tokenizer with CLIP's vocabulary size that splits every word into letters."""
    return CLIPTokenizer.from_pretrained(_tokenizer_folder().name)
