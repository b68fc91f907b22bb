"""How much of the gradient exchange the backward pass hides, on ranks in network namespaces with limited links.

`make bench-exchange`, as root on Linux. Two ranks with one core each train the SD 1.5 architecture at half its width
with random weights: the complete UNet (full), and a ControlNet (controlnet). A token bucket limits the link. Steps with
the exchange after the backward pass and during it alternate (A B A B ...). Hidden is the time that a step saves,
divided by the time of the exchange alone; medians over the pairs. The weights' gradients of both are compared bit by
bit. The last line is JSON: {"controlnet_1g", "full_1g", "controlnet_10g", "full_10g": shares, "different_bits"}.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn

from finetune_trainer.distributed.buckets import GradientBuckets
from finetune_trainer.distributed.world import World
from testing.measure.architectures import UNETS
from testing.measure.report import finish

NUM_RANKS = 2
LINKS = {"1g": "1gbit", "10g": "10gbit"}
METHODS = ("controlnet", "full")
PREFIX = f"exchange-{os.getpid()}"
NUM_TOKENS = 77


class Step:
    """One training step of a method: a forward and a backward pass, and the exchange.

    Args:
        method: "full" or "controlnet".
        world: the ranks.
        channels: width of the first level; SD 1.5 has 320.
        latent: side of the latents; SD 1.5 has 64.
        batch: samples of a rank.
    """

    def __init__(self, method: str, world: World, channels: int, latent: int, batch: int) -> None:
        torch.manual_seed(0)
        widths = tuple(channels * factor for factor in (1, 2, 4, 4))
        unet = UNet2DConditionModel(**{**UNETS["sd15"], "block_out_channels": widths})
        self._unet = unet
        self._controlnet = ControlNetModel.from_unet(unet) if method == "controlnet" else None
        trained: nn.Module = self._controlnet or unet
        if self._controlnet is not None:
            unet.requires_grad_(False)
        parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
        self.num_bytes = 4 * sum(parameter.numel() for parameter in parameters)
        self._world = world
        self._gradients = GradientBuckets(parameters, world)
        torch.manual_seed(1 + world.rank)
        self._noisy = torch.randn(batch, 4, latent, latent)
        self._hidden = torch.randn(batch, NUM_TOKENS, 768)
        self._image = torch.rand(batch, 3, 8 * latent, 8 * latent)
        self._timesteps = torch.randint(1000, (batch,))

    def run(self, overlap: bool) -> float:
        """Run one step, and return its seconds on this rank."""
        self._gradients.clear()
        self._world.barrier()
        began = time.monotonic()
        if overlap:
            self._gradients.expect_last_pass()
        torch.autograd.backward(self._predict().square().mean())
        self._gradients.reduce(self._world)
        return time.monotonic() - began

    def exchange(self) -> float:
        """Return the seconds of the exchange alone."""
        self._gradients.clear()
        self._world.barrier()
        began = time.monotonic()
        self._gradients.reduce(self._world)
        return time.monotonic() - began

    def gradients(self) -> list[Tensor]:
        """Return copies of the summed gradients."""
        trained: nn.Module = self._controlnet or self._unet
        return [parameter.grad.clone() for parameter in trained.parameters() if parameter.grad is not None]

    def _predict(self) -> Tensor:
        if self._controlnet is None:
            prediction: Tensor = self._unet(self._noisy, self._timesteps, self._hidden).sample
            return prediction
        down, middle = self._controlnet(
            self._noisy, self._timesteps, self._hidden, controlnet_cond=self._image, return_dict=False
        )
        controlled: Tensor = self._unet(
            self._noisy,
            self._timesteps,
            self._hidden,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        ).sample
        return controlled


def measure(world: World, method: str, args: argparse.Namespace) -> dict[str, float]:
    """Measure one method on the current link: medians over the pairs, of the slower rank."""
    step = Step(method, world, args.channels, args.latent, args.batch)
    step.run(overlap=True)
    seconds: dict[str, list[float]] = {"after": [], "during": [], "exchange": []}
    different = 0
    for _ in range(args.pairs):
        seconds["after"].append(step.run(overlap=False))
        expected = step.gradients()
        seconds["during"].append(step.run(overlap=True))
        different += sum(not torch.equal(one, other) for one, other in zip(expected, step.gradients(), strict=True))
        seconds["exchange"].append(step.exchange())
    slowest = torch.tensor([statistics.median(values) for values in seconds.values()], dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    after, during, exchange = slowest.tolist()
    return {
        "after": after,
        "during": during,
        "exchange": exchange,
        "bytes": step.num_bytes,
        "hidden": (after - during) / exchange,
        "different": world.gather_numbers(different)[0] + world.gather_numbers(different)[1],
    }


def run_rank(args: argparse.Namespace) -> None:
    """Measure all methods as one rank. Rank 0 prints one line of JSON for each."""
    torch.set_num_threads(1)
    files = dist.FileStore(args.store, NUM_RANKS)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", rank=args.rank, world_size=NUM_RANKS, store=files)
    world = World(args.rank, NUM_RANKS, 0, torch.device("cpu"))
    for method in args.methods:
        result = measure(world, method, args)
        if world.is_first:
            print(json.dumps({"method": method, **result}), flush=True)
    dist.destroy_process_group()


@contextlib.contextmanager
def namespaces(rate: str) -> Iterator[list[str]]:
    """Yield the names of two network namespaces that a link of this rate connects; remove them at the end."""
    names = [f"{PREFIX}-{rank}" for rank in range(NUM_RANKS)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for rank, name in enumerate(names):
            ip("-n", name, "address", "add", f"10.111.0.{rank + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            limit = ("rate", rate, "burst", "1mb", "latency", "50ms")
            ip("netns", "exec", name, "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", *limit)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def ip(*arguments: str) -> None:
    """Run `ip`."""
    subprocess.run(["ip", *arguments], check=True)


def run_ranks(rate: str, options: list[str]) -> list[dict[str, Any]]:
    """Run one process per rank on a link, each on its own core, and return rank 0's results."""
    cores = sorted(os.sched_getaffinity(0))[:NUM_RANKS]
    with namespaces(rate) as names, tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank, name in enumerate(names):
            command = ["ip", "netns", "exec", name, "taskset", "--cpu-list", str(cores[rank])]
            command += [sys.executable, "-m", "bench.exchange", "--rank", str(rank), "--store", f"{folder}/store"]
            env = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
            processes.append(subprocess.Popen([*command, *options], env=env, stdout=subprocess.PIPE, text=True))
        outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit("a rank failed")
    return [json.loads(line) for line in outputs[0].splitlines() if line.startswith("{")]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3, help="pairs of steps (default 3)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--links", nargs="+", choices=LINKS, default=list(LINKS))
    parser.add_argument("--channels", type=int, default=160, help="width of the first level (default 160)")
    parser.add_argument("--latent", type=int, default=64, help="side of the latents (default 64: 512 px)")
    parser.add_argument("--batch", type=int, default=1, help="samples of a rank in a step (default 1)")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    """Measure every link, and report."""
    args = parse()
    if args.rank is not None:
        run_rank(args)
        return
    if os.geteuid() != 0 or len(os.sched_getaffinity(0)) < NUM_RANKS:
        sys.exit("run this as root on two cores: it creates network namespaces, and each rank uses one core")
    options = ["--pairs", str(args.pairs), "--channels", str(args.channels), "--latent", str(args.latent)]
    options += ["--batch", str(args.batch), "--methods", *args.methods]
    rows, result = [], {}
    different = 0
    for link in args.links:
        for found in run_ranks(LINKS[link], options):
            different += int(found["different"])
            result[f"{found['method']}_{link}"] = round(found["hidden"], 3)
            times = [f"{found[name]:.2f}" for name in ("exchange", "after", "during")]
            rows.append([found["method"], link, f"{found['bytes'] / 1e6:.0f}", *times, f"{found['hidden']:.0%}"])
            print(f"  {rows[-1]}", flush=True)
    header = ["method", "link", "MB", "exchange s", "step, exchange after s", "step, during s", "hidden"]
    finish(header, rows, {**result, "different_bits": different})


if __name__ == "__main__":
    main()
