# ruff: noqa
"""A training script in the style of accelerate's examples: all ranks save, and it skips batches after a resume itself."""

import argparse
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, IterableDataset, TensorDataset


class Stream(IterableDataset[Any]):
    """Numbers with noise that is drawn when they are read."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[torch.Tensor]:
        for index in range(self.size):
            yield torch.tensor([float(index), float(torch.rand(()))])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", default=".")
    parser.add_argument("--resume_from_checkpoint", default=None)
    parser.add_argument("--checkpointing_steps", type=int, default=4)
    parser.add_argument("--num_epochs", type=int, default=3)
    parser.add_argument("--data", choices=("map", "iterable", "dispatch"), default="map")
    parser.add_argument("--skip", choices=("accelerate", "by_hand", "none"), default="accelerate")
    parser.add_argument("--seedable", action="store_true")
    args = parser.parse_args()
    accelerator = Accelerator(
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=args.seedable, dispatch_batches=True if args.data == "dispatch" else False
        )
    )
    set_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Dropout(0.2), torch.nn.Linear(4, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    if args.data == "map":
        dataset = TensorDataset(torch.arange(32.0).reshape(16, 2))
        loader = DataLoader(dataset, batch_size=2, shuffle=True)
    else:
        loader = DataLoader(Stream(16), batch_size=2)
    held_out = DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=2)
    model, optimizer, loader, held_out = accelerator.prepare(model, optimizer, loader, held_out)
    steps, first_epoch, resume_step = 0, 0, None
    per_epoch = 8 // accelerator.num_processes
    if args.resume_from_checkpoint:
        accelerator.load_state(args.resume_from_checkpoint)
        steps = int(os.path.basename(args.resume_from_checkpoint).replace("step_", ""))
        first_epoch, resume_step = steps // per_epoch, steps % per_epoch
    for epoch in range(first_epoch, args.num_epochs):
        active = loader
        if args.skip == "accelerate" and epoch == first_epoch and resume_step:
            active = accelerator.skip_first_batches(loader, resume_step)
        for step, batch in enumerate(active):
            if args.skip == "by_hand" and resume_step is not None and epoch == first_epoch and step < resume_step:
                continue
            values = batch[0] if isinstance(batch, (list, tuple)) else batch
            loss = (model(values * torch.rand(len(values), 1)) ** 2).mean() / 100
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
            if steps % args.checkpointing_steps == 0:
                accelerator.save_state(os.path.join(args.output_dir, f"step_{steps}"))
            for _ in held_out:
                pass
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        torch.save(accelerator.unwrap_model(model).state_dict(), os.path.join(args.output_dir, "model.pt"))


if __name__ == "__main__":
    main()
