"""Builds the untrained parts of the demo's base model, a Stable Diffusion 1.x with four million parameters.

As in SD 1.x, the VAE reduces each side by a factor of eight and has four latent channels, the UNet attends to the last
hidden states of the text encoder, and the noise schedule is scaled-linear with 1,000 timesteps and noise as the target.
Called by `train_base` only. The trained model is in `examples/base-circles` and loads with plain diffusers.
"""

from __future__ import annotations

from typing import Final

from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

IMAGE_SIZE: Final = 64
NUM_TOKENS: Final = 24
_LATENT_CHANNELS: Final = 4
_VAE_CHANNELS: Final = (16, 32, 64, 64)
_VAE_GROUPS: Final = 2
_UNET_CHANNELS: Final = (64, 96)
_TEXT_WIDTH: Final = 64


def build_vae() -> AutoencoderKL:
    """Build the VAE: images (batch, 3, 64, 64) in [-1, 1] to latents (batch, 4, 8, 8) and back."""
    num_levels = len(_VAE_CHANNELS)
    return AutoencoderKL(
        sample_size=IMAGE_SIZE,
        latent_channels=_LATENT_CHANNELS,
        block_out_channels=_VAE_CHANNELS,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * num_levels,
        up_block_types=("UpDecoderBlock2D",) * num_levels,
        norm_num_groups=_VAE_GROUPS,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build the text encoder: token ids (batch, 24) to hidden states (batch, 24, 64)."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=NUM_TOKENS,
            hidden_size=_TEXT_WIDTH,
            intermediate_size=4 * _TEXT_WIDTH,
            projection_dim=_TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """Build the UNet: noisy latents (batch, 4, 8, 8), timesteps (batch) and hidden states to the noise."""
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 2 ** (len(_VAE_CHANNELS) - 1),
        in_channels=_LATENT_CHANNELS,
        out_channels=_LATENT_CHANNELS,
        block_out_channels=_UNET_CHANNELS,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=_TEXT_WIDTH,
        attention_head_dim=8,
        norm_num_groups=16,
    )


def build_scheduler() -> PNDMScheduler:
    """Build the noise schedule of SD 1.x, with its default sampler."""
    scheduler = PNDMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )
    # PNDM has no such setting, but DDIM and DDPM read theirs from the same file, and clipped latents ruin pictures.
    scheduler.register_to_config(clip_sample=False)
    return scheduler
