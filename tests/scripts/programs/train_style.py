# ruff: noqa
"""A training script in the style of diffusers' examples. It knows nothing of this project."""

import argparse
import math
import os
import random
import shutil
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import Dataset
from tqdm.auto import tqdm  # type: ignore[import-untyped]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", type=str, default="model")
    parser.add_argument("--resume_from_checkpoint", type=str, default=None)
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--checkpoints_total_limit", type=int, default=None)
    parser.add_argument("--max_train_steps", type=int, default=None)
    parser.add_argument("--num_train_epochs", type=int, default=2)
    parser.add_argument("--train_batch_size", type=int, default=2)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--num_samples", type=int, default=20)
    parser.add_argument("--dataloader_num_workers", type=int, default=0)
    parser.add_argument("--validation_epochs", type=int, default=1)
    parser.add_argument("--use_ema", action="store_true")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--log_batches", type=str, default=None)
    return parser.parse_args()


class Pictures(Dataset[dict[str, torch.Tensor]]):
    """Pictures with random crops and flips."""

    def __init__(self, num_samples: int) -> None:
        self.pictures = torch.rand(num_samples, 3, 10, 10, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        top, left = (int(torch.randint(0, 3, ())) for _ in range(2))
        picture = self.pictures[index][:, top : top + 8, left : left + 8]
        return {"pixel_values": picture.flip(-1) if random.random() < 0.5 else picture, "index": torch.tensor(index)}


def make_model() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.SiLU(), torch.nn.Dropout(0.1), torch.nn.Conv2d(4, 3, 3, padding=1)
    )


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        project_config=ProjectConfiguration(project_dir=args.output_dir),
    )
    if args.seed is not None:
        set_seed(args.seed)
    if accelerator.is_main_process:
        os.makedirs(args.output_dir, exist_ok=True)
    model = make_model()
    ema = EMAModel(model.parameters(), decay=0.9) if args.use_ema else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = torch.utils.data.DataLoader(
        Pictures(args.num_samples),
        shuffle=True,
        batch_size=args.train_batch_size,
        num_workers=args.dataloader_num_workers,
    )

    def save_model_hook(models: list[Any], weights: list[Any], output_dir: str) -> None:
        if accelerator.is_main_process:
            if ema is not None:
                torch.save(ema.state_dict(), os.path.join(output_dir, "ema.pt"))
            for model in models:
                torch.save(accelerator.unwrap_model(model).state_dict(), os.path.join(output_dir, "model.pt"))
                weights.pop()

    def load_model_hook(models: list[Any], input_dir: str) -> None:
        if ema is not None:
            ema.load_state_dict(torch.load(os.path.join(input_dir, "ema.pt")))
        while models:
            accelerator.unwrap_model(models.pop()).load_state_dict(torch.load(os.path.join(input_dir, "model.pt")))

    accelerator.register_save_state_pre_hook(save_model_hook)
    accelerator.register_load_state_pre_hook(load_model_hook)
    updates = math.ceil(math.ceil(len(loader) / accelerator.num_processes) / args.gradient_accumulation_steps)
    max_steps = args.max_train_steps or args.num_train_epochs * updates
    lr_scheduler = get_scheduler(
        "cosine",
        optimizer=optimizer,
        num_warmup_steps=2 * accelerator.num_processes,
        num_training_steps=max_steps * accelerator.num_processes,
    )
    model, optimizer, loader, lr_scheduler = accelerator.prepare(model, optimizer, loader, lr_scheduler)
    updates = math.ceil(len(loader) / args.gradient_accumulation_steps)
    epochs = math.ceil(max_steps / updates)
    if accelerator.is_main_process:
        accelerator.init_trackers("style", config=vars(args))
    global_step, first_epoch = 0, 0
    if args.resume_from_checkpoint:
        if args.resume_from_checkpoint != "latest":
            path = os.path.basename(args.resume_from_checkpoint)
        else:
            dirs = [each for each in os.listdir(args.output_dir) if each.startswith("checkpoint")]
            path = max(dirs, key=lambda each: int(each.split("-")[1])) if dirs else ""
        if not path:
            accelerator.print("no checkpoint: starting a new run")
        else:
            accelerator.print(f"Resuming from checkpoint {path}")
            accelerator.load_state(os.path.join(args.output_dir, path))
            global_step = int(path.split("-")[1])
            first_epoch = global_step // updates
    progress_bar = tqdm(
        range(max_steps), initial=global_step, desc="Steps", disable=not accelerator.is_local_main_process
    )
    for epoch in range(first_epoch, epochs):
        model.train()
        train_loss = 0.0
        for batch in loader:
            with accelerator.accumulate(model):
                pixels = batch["pixel_values"]
                noise = torch.randn_like(pixels)
                strength = torch.rand(len(pixels), 1, 1, 1)
                loss = F.mse_loss(model(pixels + strength * noise), noise)
                average = accelerator.gather(loss.repeat(args.train_batch_size)).mean()
                train_loss += average.item() / args.gradient_accumulation_steps
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            if args.log_batches:
                with open(f"{args.log_batches}-{accelerator.process_index}", "a") as log:
                    log.write(f"{global_step} {batch['index'].tolist()} {float(strength[0]):.6f}\n")
            if accelerator.sync_gradients:
                if ema is not None:
                    ema.step(model.parameters())
                progress_bar.update(1)
                global_step += 1
                accelerator.log({"train_loss": train_loss}, step=global_step)
                train_loss = 0.0
                if global_step % args.checkpointing_steps == 0 and accelerator.is_main_process:
                    if args.checkpoints_total_limit is not None:
                        found = [each for each in os.listdir(args.output_dir) if each.startswith("checkpoint")]
                        found = sorted(found, key=lambda each: int(each.split("-")[1]))
                        for old in found[: max(0, len(found) - args.checkpoints_total_limit + 1)]:
                            shutil.rmtree(os.path.join(args.output_dir, old))
                    accelerator.save_state(os.path.join(args.output_dir, f"checkpoint-{global_step}"))
            progress_bar.set_postfix(step_loss=loss.detach().item(), lr=lr_scheduler.get_last_lr()[0])
            if global_step >= max_steps:
                break
        if accelerator.is_main_process and (epoch + 1) % args.validation_epochs == 0:
            with torch.no_grad():
                accelerator.unwrap_model(model)(torch.randn(1, 3, 8, 8))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        trained = accelerator.unwrap_model(model)
        if ema is not None:
            ema.copy_to(trained.parameters())
        torch.save(trained.state_dict(), os.path.join(args.output_dir, "model.pt"))
    accelerator.end_training()


if __name__ == "__main__":
    main()
