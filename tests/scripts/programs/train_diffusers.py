# ruff: noqa
"""A training script that writes what diffusers' examples write. It knows nothing of this project."""

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pretrained_model_name_or_path", type=str, required=True)
    parser.add_argument("--output_dir", type=str, default="model")
    parser.add_argument("--resume_from_checkpoint", type=str, default=None)
    parser.add_argument("--max_train_steps", type=int, default=2)
    parser.add_argument("--train_batch_size", type=int, default=1)
    parser.add_argument("--rank", type=int, default=None)
    parser.add_argument("--seed", type=int, default=None)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    accelerator = Accelerator()
    if args.seed is not None:
        set_seed(args.seed)
    pipeline = StableDiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path)
    unet = pipeline.unet
    if args.rank:
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=["to_q", "to_v"]))
    weights = [each for each in unet.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    size, width = unet.config.sample_size, unet.config.cross_attention_dim
    data = torch.utils.data.TensorDataset(torch.randn(8, unet.config.in_channels, size, size))
    loader = torch.utils.data.DataLoader(data, batch_size=args.train_batch_size, shuffle=True)
    unet, optimizer, loader = accelerator.prepare(unet, optimizer, loader)
    step = 0
    if args.resume_from_checkpoint:
        accelerator.load_state(args.resume_from_checkpoint)
        step = int(args.resume_from_checkpoint.rstrip("/").split("-")[-1])
    for (latents,) in loader:
        if step >= args.max_train_steps:
            break
        times = torch.randint(0, 1000, (len(latents),))
        text = torch.randn(len(latents), 4, width)
        loss = F.mse_loss(unet(latents, times, text).sample, torch.randn_like(latents))
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        unet = accelerator.unwrap_model(unet)
        if args.rank:
            layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
            StableDiffusionPipeline.save_lora_weights(args.output_dir, layers)
        else:
            pipeline.unet = unet
            pipeline.save_pretrained(args.output_dir)
    accelerator.end_training()


if __name__ == "__main__":
    main()
