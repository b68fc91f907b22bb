# ruff: noqa
"""A training script that works with FSDP. Only its main process saves, as in diffusers' examples."""

import argparse
import os

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", default=".")
    parser.add_argument("--resume_from_checkpoint", default=None)
    parser.add_argument("--checkpointing_steps", type=int, default=4)
    parser.add_argument("--max_train_steps", type=int, default=10)
    args = parser.parse_args()
    accelerator = Accelerator()
    set_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loader = DataLoader(TensorDataset(torch.arange(64.0).reshape(16, 4) / 64), batch_size=2, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    print("distribution:", accelerator.distributed_type.name, flush=True)
    steps = 0
    if args.resume_from_checkpoint:
        accelerator.load_state(args.resume_from_checkpoint)
        steps = int(os.path.basename(args.resume_from_checkpoint).replace("checkpoint-", ""))
    while steps < args.max_train_steps:
        for (values,) in loader:
            loss = (model(values) - torch.rand_like(values)).pow(2).mean()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
            if steps % args.checkpointing_steps == 0 and accelerator.is_main_process:
                accelerator.save_state(os.path.join(args.output_dir, f"checkpoint-{steps}"))
            if steps >= args.max_train_steps:
                break
    accelerator.wait_for_everyone()
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        torch.save(state, os.path.join(args.output_dir, "model.pt"))
    accelerator.end_training()


if __name__ == "__main__":
    main()
