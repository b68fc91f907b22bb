"""Trains the VAE of the demo's base model. Called by `train_base`.

The training data contain random shapes as well as circles, so that the VAE can also represent other styles.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from finetune_trainer.demo.architecture import IMAGE_SIZE, build_vae
from finetune_trainer.demo.circles import make_scene, paint
from finetune_trainer.demo.shapes import paint_shapes

_LOG = logging.getLogger(__name__)

_NUM_SHAPES = 8192
_NUM_CIRCLES = 4096
_LEARNING_RATE = 2e-3
_KL_WEIGHT = 1e-6

# (end of the stage as a fraction of all steps, side of the crops, batch size). Colours are learnt from small crops,
# which cost a sixteenth of complete pictures. Complete pictures come last, for features that need a larger context.
_STAGES = ((0.5, 16, 16), (0.8, 32, 16), (1.0, 64, 8))


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB picture to uint8 (3, height, width)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalise(pixels: Tensor) -> Tensor:
    """Convert pixels from 0 to 255 to the input range of the VAE: float32 from -1 to 1."""
    return pixels.float() / 127.5 - 1


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Return the means of the unscaled latents (pictures, 4, 8, 8) of uint8 pictures (pictures, 3, 64, 64)."""
    return torch.cat([vae.encode(normalise(part)).latent_dist.mean for part in torch.split(pixels, 64)])


def train_vae(num_steps: int, seed: int) -> AutoencoderKL:
    """Train a VAE from scratch and set its `scaling_factor` so that scaled latents of circles have unit variance."""
    torch.manual_seed(seed)
    vae = build_vae()
    _init_as_average(vae)
    pictures = _pictures(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, num_steps, pct_start=0.05)
    for step, pixels in enumerate(_batches(pictures, num_steps, seed)):
        posterior = vae.encode(pixels).latent_dist
        reconstruction = _picture_loss(vae.decode(posterior.sample()).sample, pixels)
        loss = reconstruction + _KL_WEIGHT * posterior.kl().mean()
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            _LOG.info("vae step %d/%d loss %.4f", step, num_steps, reconstruction.item())
    vae.eval()
    vae.register_to_config(scaling_factor=round(1 / encode(vae, pictures[-512:]).std().item(), 5))
    return vae


def _init_as_average(vae: AutoencoderKL) -> None:
    """Initialise the VAE as an average of pixels with little noise. Torch's defaults need many times more steps."""
    for name, parameter in vae.named_parameters():
        layer = name.removesuffix(".weight")
        if layer.endswith("samplers.0.conv"):
            nn.init.dirac_(parameter)
        elif layer.endswith(("conv_shortcut", "conv_in", "conv_out", "quant_conv")):
            nn.init.orthogonal_(parameter)
    log_variance = slice(vae.config.latent_channels, None)
    nn.init.zeros_(vae.quant_conv.weight.data[log_variance])
    nn.init.constant_(vae.quant_conv.bias.data[log_variance], -5.0)


def _pictures(seed: int) -> Tensor:
    random = np.random.default_rng(seed)
    shapes = [to_tensor(paint_shapes(random, IMAGE_SIZE)) for _ in range(_NUM_SHAPES)]
    # The circles come last, because the scaling factor is computed from the last pictures.
    circles = [to_tensor(paint(make_scene(seed, "train", index), size=IMAGE_SIZE)) for index in range(_NUM_CIRCLES)]
    return torch.stack(shapes + circles)


def _batches(pictures: Tensor, num_steps: int, seed: int) -> Iterator[Tensor]:
    """Yield random crops of random pictures, randomly rotated and mirrored."""
    random = torch.Generator().manual_seed(seed)
    for step in range(num_steps):
        _, side, batch_size = next(stage for stage in _STAGES if step < stage[0] * num_steps)
        rows = torch.randint(len(pictures), (batch_size,), generator=random)
        top, left = torch.randint(IMAGE_SIZE - side + 1, (2,), generator=random).tolist()
        turns, mirror = torch.randint(4, (2,), generator=random).tolist()
        batch = pictures[rows, :, top : top + side, left : left + side].rot90(turns, (2, 3))
        yield normalise(batch.flip(3) if mirror % 2 else batch)


def _picture_loss(decoded: Tensor, pixels: Tensor) -> Tensor:
    """Return the sum of the squared error, for fast convergence of colours, and the absolute error, for sharp edges."""
    error = decoded - pixels
    return error.square().mean() + error.abs().mean()
