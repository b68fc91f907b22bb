"""Trains the UNet and the text encoder of the demo's base model, on plain circles only. Called by `train_base`."""

from __future__ import annotations

import logging
from typing import Final

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPTokenizer

from finetune_trainer.demo.architecture import IMAGE_SIZE
from finetune_trainer.demo.base_vae import encode, to_tensor
from finetune_trainer.demo.circles import make_scene, paint

_LOG = logging.getLogger(__name__)

_NUM_SAMPLES: Final = 8192
_BATCH_SIZE: Final = 32
_LEARNING_RATE: Final = 2e-3
_CAPTION_DROPOUT: Final = 0.1
_MAX_EMPHASIS: Final = 10.0


def train_unet(pipeline: StableDiffusionPipeline, num_steps: int, seed: int) -> None:
    """Train the pipeline's UNet and text encoder, in place, to predict the noise in latents of captioned circles."""
    torch.manual_seed(seed)
    unet, text_encoder = pipeline.unet, pipeline.text_encoder
    latents, token_ids = _samples(pipeline.vae, pipeline.tokenizer, seed)
    empty = _token_ids(pipeline.tokenizer, [""])
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    weights = loss_weights(schedule.alphas_cumprod)
    trained = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, num_steps, pct_start=0.05)
    for step in range(num_steps):
        rows = torch.randint(len(latents), (_BATCH_SIZE,))
        dropped = torch.rand(_BATCH_SIZE, 1) < _CAPTION_DROPOUT
        states = text_encoder(torch.where(dropped, empty, token_ids[rows])).last_hidden_state
        timesteps = torch.randint(schedule.config.num_train_timesteps, (_BATCH_SIZE,))
        noise = torch.randn_like(latents[rows])
        noisy = schedule.add_noise(latents[rows], noise, timesteps)
        errors = (unet(noisy, timesteps, states).sample - noise).square().mean((1, 2, 3))
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward((weights[timesteps] * errors).mean())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        rates.step()
        if step % 100 == 0:
            _LOG.info("unet step %d/%d loss %.4f", step, num_steps, errors.mean().item())


def loss_weights(alphas_cumprod: Tensor) -> Tensor:
    """Return a weight for the squared error of the noise at each timestep: 1 + 1/SNR, up to a limit.

    Without a limit, this is the squared error of v (Salimans and Ho, 2022, appendix D). The noisiest timesteps decide
    the colours, and a short training needs a larger weight for them.
    """
    inverse_snr = (1 - alphas_cumprod) / alphas_cumprod
    return 1 + inverse_snr.clamp(max=_MAX_EMPHASIS)


def _samples(vae: AutoencoderKL, tokenizer: CLIPTokenizer, seed: int) -> tuple[Tensor, Tensor]:
    """Return scaled latents (samples, 4, 8, 8) and token ids (samples, tokens). They are encoded once."""
    scenes = [make_scene(seed, "train", index) for index in range(_NUM_SAMPLES)]
    pixels = torch.stack([to_tensor(paint(scene, size=IMAGE_SIZE)) for scene in scenes])
    token_ids = _token_ids(tokenizer, [scene.caption for scene in scenes])
    return encode(vae, pixels) * vae.config.scaling_factor, token_ids


def _token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    ids: Tensor = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids
