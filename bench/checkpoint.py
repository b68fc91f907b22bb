"""Measures how long a save blocks training, compared with `accelerator.save_state` on the same state, in one run.

Two states: a UNet with AdamW, the largest that fits this machine's memory, and a LoRA with AdamW. Steps are real:
forward, backward, AdamW. Our save runs as in the loop, in parallel with the next step; the stall is the time that the
loop waited, by its own clock. Accelerate's stall is the duration of its call. Both write to the same disk; the figures
are medians of a few rounds.

The time to durable is the time until a checkpoint is written, flushed, read back from the disk, and committed, without
training in parallel. The table compares it with one plain write of the same bytes with fsync.

The last line is JSON: {"stall_ratio_full", "stall_ratio_lora", "durable_over_raw_write"}.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import nn

from finetune_contract import paths
from finetune_trainer.checkpoint.checkpointer import Checkpointer
from finetune_trainer.checkpoint.split import total_bytes
from finetune_trainer.checkpoint.state import TrainState
from finetune_trainer.checkpoint.store.folder import FolderStore
from finetune_trainer.checkpoint.store.retention import Retention
from finetune_trainer.distributed.world import World
from finetune_trainer.report import Reporter
from testing.measure.report import finish
from testing.trainer import tiny

WIDTHS = (320, 256, 224, 192, 160, 128, 96, 64, 32)
"""Channels of the UNet's first block; 320 is that of Stable Diffusion 1.5, with 860 million parameters."""
BYTES_PER_PARAMETER = 36
"""Weights, gradients, two moments, a copy of all but the gradients, and page cache for reading and writing."""
MEMORY_SHARE = 0.6
CHUNK = 8 * 1024 * 1024


@dataclass
class SaveFigures:
    """The measurements of one state, in seconds and bytes."""

    name: str
    num_bytes: int = 0
    ours_bytes: int = 0
    theirs_bytes: int = 0
    stalls: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    durable: list[float] = field(default_factory=list)
    durable_during_steps: list[float] = field(default_factory=list)
    raw: list[float] = field(default_factory=list)
    plain_steps: list[float] = field(default_factory=list)
    saving_steps: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Return our stall divided by accelerate's."""
        return statistics.median(self.stalls) / statistics.median(self.theirs)

    @property
    def durable_ratio(self) -> float:
        """Return the time to durable divided by the time of a plain write of the same bytes."""
        return statistics.median(self.durable) / statistics.median(self.raw)


class _StallReporter(Reporter):
    """Gives access to the stall and the time to durable that a rank reports."""

    def __init__(self) -> None:
        super().__init__(0, None)

    @property
    def stall_and_durable(self) -> tuple[float, float]:
        """Return both values of the newest checkpoint."""
        checkpoint = self._report.checkpoint
        assert checkpoint is not None
        return checkpoint.stall_seconds or 0.0, checkpoint.durable_seconds or 0.0


class SaveBench:
    """One state, trained by real steps."""

    def __init__(self, name: str, unet: nn.Module, parameters: Mapping[str, nn.Parameter], folder: Path) -> None:
        self.figures = SaveFigures(name)
        self._unet = unet
        self._folder = folder
        optimizer = torch.optim.AdamW(parameters.values(), lr=1e-5, fused=True)
        self._state = TrainState(parameters, optimizer)
        self._inputs = (torch.randn(1, 4, 16, 16), torch.tensor([7]), torch.randn(1, 8, 768))
        self._reporter = _StallReporter()
        store = FolderStore(folder / "ours", "uid", 1, Retention(keep=1))
        spec = tiny.make_spec(Path("base"), Path("data"))
        self._checkpointer = Checkpointer(spec, World(0, 1, 0, torch.device("cpu")), store, self._reporter)
        self._checkpointer.restore(self._state)
        self._accelerator = Accelerator(cpu=True)
        self._accelerator.prepare(_holder(parameters), optimizer)

    def step(self) -> float:
        """Run one optimizer step, and return its duration in seconds."""
        began = time.perf_counter()
        predicted = self._unet(*self._inputs, return_dict=False)[0]
        predicted.square().mean().backward()
        self._checkpointer.before_update()
        with self._state.updating():
            self._state.optimizer.step()
            self._state.step += 1
        for parameter in self._state.parameters.values():
            parameter.grad = None
        return time.perf_counter() - began

    def round(self) -> None:
        """Take each measurement once."""
        figures = self.figures
        figures.plain_steps += [self.step(), self.step()]
        self._ours_during_steps()
        self._ours_alone()
        self._theirs()
        os.sync()
        figures.raw.append(raw_write(self._folder / "raw", figures.ours_bytes))

    def warm_up(self) -> None:
        """Run the first steps and the first save of each kind, which allocate buffers."""
        self.step()
        self.figures.num_bytes = total_bytes(self._state.snapshot({}).tensors)
        self._ours_during_steps()
        self._theirs()
        for kept in (
            self.figures.stalls,
            self.figures.theirs,
            self.figures.durable_during_steps,
            self.figures.saving_steps,
        ):
            kept.clear()

    def _ours_during_steps(self) -> None:
        os.sync()
        before = self._reporter.stall_and_durable if self._reporter._report.checkpoint else None
        self._checkpointer.save(self._state)
        while before == (self._reporter.stall_and_durable if self._reporter._report.checkpoint else None):
            self.figures.saving_steps.append(self.step())
        stall, durable = self._reporter.stall_and_durable
        self.figures.stalls.append(stall)
        self.figures.durable_during_steps.append(durable)

    def _ours_alone(self) -> None:
        self.step()
        os.sync()
        began = time.perf_counter()
        self._checkpointer.save_and_wait(self._state)
        self.figures.durable.append(time.perf_counter() - began)
        (folder,) = paths.checkpoints(self._folder / "ours").glob("step-*")
        self.figures.ours_bytes = sum(file.stat().st_size for file in folder.iterdir())

    def _theirs(self) -> None:
        os.sync()
        folder = self._folder / "theirs"
        shutil.rmtree(folder, ignore_errors=True)
        began = time.perf_counter()
        self._accelerator.save_state(str(folder))
        self.figures.theirs.append(time.perf_counter() - began)
        self.figures.theirs_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        os.sync()
        shutil.rmtree(folder)


def _holder(parameters: Mapping[str, nn.Parameter]) -> nn.Module:
    """Return a module with exactly these parameters, so that both sides save the same state."""
    holder = nn.Module()
    for name, parameter in parameters.items():
        holder.register_parameter(name.replace(".", "_"), parameter)
    return holder


def raw_write(path: Path, num_bytes: int) -> float:
    """Return the duration of a plain write of random bytes with fsync, in seconds."""
    chunk = os.urandom(CHUNK)
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        left = num_bytes
        while left > 0:
            left -= file.write(memoryview(chunk)[: min(left, CHUNK)])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return seconds


def make_unet(width: int) -> UNet2DConditionModel:
    """Return a UNet with the layout of Stable Diffusion 1.5."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        cross_attention_dim=768,
        attention_head_dim=8,
    )


def count_parameters(width: int) -> int:
    """Return the number of parameters of a UNet of this width, without allocating them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make_unet(width).parameters())


def choose_width(limit: int | None) -> int:
    """Return the widest UNet whose training and saving fit this machine's free memory and disk."""
    free_bytes = min(
        MEMORY_SHARE * psutil.virtual_memory().available, psutil.disk_usage(tempfile.gettempdir()).free / 2
    )
    for width in WIDTHS:
        if width <= (limit or WIDTHS[0]) and count_parameters(width) * BYTES_PER_PARAMETER <= free_bytes:
            return width
    return WIDTHS[-1]


def measure(bench: SaveBench, rounds: int) -> SaveFigures:
    """Run all rounds of one state."""
    print(f"  {bench.figures.name}: warm-up, not counted", flush=True)
    bench.warm_up()
    for number in range(rounds):
        bench.round()
        figures = bench.figures
        print(
            f"  {figures.name}, round {number + 1}/{rounds}: stall {1000 * figures.stalls[-1]:.1f} ms, accelerate "
            f"{1000 * figures.theirs[-1]:.1f} ms; durable {figures.durable[-1]:.2f} s, raw {figures.raw[-1]:.2f} s",
            flush=True,
        )
    return bench.figures


def lora_parameters(unet: UNet2DConditionModel) -> dict[str, nn.Parameter]:
    """Add adapters to the attention projections, freeze all other weights, and return the adapters' parameters."""
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    return {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}


def row(figures: SaveFigures) -> list[object]:
    """Return one line of the table."""
    median = statistics.median
    return [
        figures.name,
        f"{figures.num_bytes / 1e6:.1f}",
        f"{figures.ours_bytes / 1e6:.1f} / {figures.theirs_bytes / 1e6:.1f}",
        f"{1000 * median(figures.stalls):.2f}",
        f"{1000 * median(figures.theirs):.1f}",
        f"{100 * figures.ratio:.2f} %",
        f"{median(figures.plain_steps):.2f} / {median(figures.saving_steps):.2f}",
        f"{median(figures.durable):.2f} / {median(figures.durable_during_steps):.2f}",
        f"{median(figures.raw):.2f}",
    ]


def main() -> None:
    """Run the bench, and print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each measurement (default 3)")
    parser.add_argument("--width", type=int, default=None, help="widest UNet to try; default: what fits")
    parser.add_argument("--no-limit", action="store_true", help="exit with 0 even if the stall is over 5 percent")
    args = parser.parse_args()
    width = choose_width(args.width)
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-") as name:
        print(f"UNet of width {width}: {count_parameters(width) / 1e6:.0f} million parameters", flush=True)
        unet = make_unet(width)
        full = measure(SaveBench("full", unet, dict(unet.named_parameters()), Path(name) / "full"), args.rounds)
        shutil.rmtree(Path(name) / "full")
        unet = make_unet(min(width, 96))
        lora = measure(SaveBench("LoRA", unet, lora_parameters(unet), Path(name) / "lora"), args.rounds)
    result = {
        "stall_ratio_full": round(full.ratio, 4),
        "stall_ratio_lora": round(lora.ratio, 4),
        "durable_over_raw_write": round(full.durable_ratio, 3),
    }
    header = [
        "state",
        "MB",
        "MB on disk: ours / accelerate",
        "our stall ms",
        "accelerate ms",
        "stall ratio",
        "s a step: plain / saving",
        "s to durable: alone / training",
        "s raw write",
    ]
    finish(header, [row(full), row(lora)], result)
    if max(full.ratio, lora.ratio) > 0.05 and not args.no_limit:
        sys.exit(1)


if __name__ == "__main__":
    main()
