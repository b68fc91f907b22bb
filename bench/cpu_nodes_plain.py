"""Textual inversion as plain scripts do it: DDP of the text encoder under torchrun. Called by `bench.cpu_nodes`.

The script trains the complete table of embeddings, as common scripts do, on prepared latents. Rank 0 prints one line of
JSON with the images per second of all ranks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
import torch.distributed as dist
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import CLIPTextModel, CLIPTokenizer

TOKEN = "<shape>"
SPEED_STEPS = 20
"""Last steps that the speed is the mean of, as the trainer reports it."""


def main() -> None:
    """Train, and report the speed without the first steps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("--batch", type=int, required=True, help="samples of a rank in a step")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--size", type=int, required=True, help="side of the images in pixels")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    tokenizer = CLIPTokenizer.from_pretrained(args.base, subfolder="tokenizer")
    tokenizer.add_tokens(TOKEN)
    encoder = CLIPTextModel.from_pretrained(args.base, subfolder="text_encoder", torch_dtype=torch.float32)
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    encoder.requires_grad_(False)
    table = encoder.get_input_embeddings().weight.requires_grad_(True)
    unet = UNet2DConditionModel.from_pretrained(args.base, subfolder="unet", torch_dtype=torch.float32)
    unet.requires_grad_(False)
    schedule = DDPMScheduler.from_pretrained(args.base, subfolder="scheduler")
    wrapped = DistributedDataParallel(encoder)
    optimizer = torch.optim.AdamW([table], lr=1e-3)
    tokens = tokenizer(
        [f"a photo of {TOKEN}"] * args.batch,
        padding="max_length",
        max_length=encoder.config.max_position_embeddings,
        return_tensors="pt",
    ).input_ids
    side = args.size * unet.config.sample_size // _image_size(args.base, unet.config.sample_size)
    torch.manual_seed(dist.get_rank())
    latents = torch.randn(args.batch, unet.config.in_channels, side, side)
    seconds = []
    for _ in range(args.steps):
        began = time.perf_counter()
        noise = torch.randn_like(latents)
        timesteps = torch.randint(1000, (args.batch,))
        noisy = schedule.add_noise(latents, noise, timesteps)
        prediction = unet(noisy, timesteps, wrapped(tokens)[0]).sample
        loss = nn.functional.mse_loss(prediction, noise)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        loss.item()
        seconds.append(time.perf_counter() - began)
    if dist.get_rank() == 0:
        speed = args.batch * dist.get_world_size() / statistics.mean(seconds[-SPEED_STEPS:])
        print(json.dumps({"images_per_second": speed}), flush=True)
    dist.destroy_process_group()


def _image_size(base: str, latent: int) -> int:
    """Return the side of the base's images in pixels."""
    from diffusers import AutoencoderKL  # noqa: PLC0415  slow to import

    config = AutoencoderKL.load_config(base, subfolder="vae")
    return latent * int(2 ** (len(config["block_out_channels"]) - 1))


if __name__ == "__main__":
    main()
