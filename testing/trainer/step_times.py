"""A script in accelerate's style that measures its own steps; `bench.script_hook` runs it with the hook and without."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset


def main() -> None:
    """Train a small model, and write the seconds of each step: of the clock, and of its thread on a CPU."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_train_steps", type=int, required=True)
    args = parser.parse_args()
    accelerator = Accelerator()
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    data = TensorDataset(torch.rand(2 * args.max_train_steps, 64))
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=1, shuffle=True))
    seconds: dict[str, list[float]] = {"wall": [], "cpu": []}
    begun = time.perf_counter(), time.thread_time()
    for (batch,) in loader:
        loss = model(batch).pow(2).mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.log({"loss": 0.0})
        now = time.perf_counter(), time.thread_time()
        for kind, start, end in zip(seconds, begun, now, strict=True):
            seconds[kind].append(end - start)
        begun = now
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / f"seconds-{accelerator.process_index}.json").write_text(json.dumps(seconds), encoding="utf-8")


if __name__ == "__main__":
    main()
