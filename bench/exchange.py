"""How much of the gradient exchange the backward pass hides, on ranks in network namespaces with limited links.

`make bench-exchange`, as root on Linux. Two ranks with one core each train the SD 1.5 architecture at a fraction of its
width with random weights: the complete UNet (full), and a ControlNet (controlnet). The buckets are smaller by the same
fraction, so there are as many as in the complete model. A token bucket limits the link.

Three steps alternate: without the exchange, with the exchange during the backward pass, and with the exchange after it.
Hidden is 1 - (step during - step without) / exchange alone; the median of the rounds, of the slower rank. The bound is
the share that the order of the buckets allows. The gradients of the last two steps are compared bit by bit.

With `--compute accelerator` (default) the ranks replay a recorded backward pass and sleep in between, as the core of a
rank with an accelerator is idle while it computes; the backward pass takes `--ratio` times the exchange. With `cpu`
they compute on their core. The exchange then needs a part of the core for itself ("processor"), which nothing can hide.

The last line is JSON: {"<method>_<link>_<compute>": share, ..., "different_bits": 0}.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import torch
import torch.distributed as dist

from finetune_contract.spec import ExchangePrecision
from finetune_trainer.distributed.world import World
from testing.measure.exchange import (
    ExchangedStep,
    ModelPass,
    Pass,
    ReplayedPass,
    StepTimes,
    bound_of,
    scaled_bucket_numel,
)
from testing.measure.namespaces import pair
from testing.measure.report import finish

NUM_RANKS = 2
LINKS = {"1g": "1gbit", "10g": "10gbit"}
METHODS = ("controlnet", "full")
COMPUTE = ("accelerator", "cpu")
PREFIX = f"exchange-{os.getpid()}"


def measure(world: World, method: str, compute: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one method on the current link: medians over the rounds, of the slower rank."""
    model = ModelPass(method, world.rank, args.channels, args.latent, args.batch)
    bucket_numel = scaled_bucket_numel(args.channels)
    timeline, gradients = model.record()
    step = ExchangedStep(model.parameters, world, ExchangePrecision(args.precision), bucket_numel)
    alone = max(world.share(step.measure_exchange(model), source) for source in range(NUM_RANKS))
    work: Pass = model
    if compute == "accelerator":
        timeline = timeline.scaled(args.ratio * alone)
        work = ReplayedPass(model.parameters, timeline, gradients)
    rounds, different = [], 0
    for _ in range(args.rounds):
        times, new = step.measure(work)
        rounds.append(slowest(times))
        different += sum(world.gather_numbers(new))
    exchange = statistics.median(each.exchange for each in rounds)
    return {
        **{field.name: statistics.median(getattr(each, field.name) for each in rounds) for field in FIELDS},
        "bytes": 4 * sum(parameter.numel() for parameter in model.parameters),
        "backward": timeline.backward,
        "bound": bound_of(timeline, model.parameters, bucket_numel, exchange),
        "hidden": statistics.median(1 - (each.during - each.without) / each.exchange for each in rounds),
        "different": different,
    }


FIELDS = dataclasses.fields(StepTimes)


def slowest(times: StepTimes) -> StepTimes:
    """Return the longest times of all ranks."""
    values = torch.tensor(dataclasses.astuple(times), dtype=torch.float64)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return StepTimes(*values.tolist())


def run_rank(args: argparse.Namespace) -> None:
    """Measure all methods as one rank. Rank 0 prints one line of JSON for each."""
    torch.set_num_threads(1)
    files = dist.FileStore(args.store, NUM_RANKS)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", rank=args.rank, world_size=NUM_RANKS, store=files)
    world = World(args.rank, NUM_RANKS, 0, torch.device("cpu"))
    for method in args.methods:
        for compute in args.compute:
            result = measure(world, method, compute, args)
            if world.is_first:
                print(json.dumps({"method": method, "compute": compute, **result}), flush=True)
    dist.destroy_process_group()


def run_ranks(rate: str, options: list[str]) -> list[dict[str, Any]]:
    """Run one process per rank on a link, each on its own core, and return rank 0's results."""
    cores = sorted(os.sched_getaffinity(0))[:NUM_RANKS]
    with pair(PREFIX, rate) as names, tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank, name in enumerate(names):
            command = ["ip", "netns", "exec", name, "taskset", "--cpu-list", str(cores[rank])]
            command += [sys.executable, "-m", "bench.exchange", "--rank", str(rank), "--store", f"{folder}/store"]
            env = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
            processes.append(subprocess.Popen([*command, *options], env=env, stdout=subprocess.PIPE, text=True))
        try:
            outputs = [process.communicate()[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
    if any(process.returncode for process in processes):
        sys.exit("a rank failed")
    return [json.loads(line) for line in outputs[0].splitlines() if line.startswith("{")]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="rounds of three steps (default 5)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--links", nargs="+", choices=LINKS, default=list(LINKS))
    parser.add_argument("--compute", nargs="+", choices=COMPUTE, default=["accelerator"])
    parser.add_argument("--precision", choices=[*ExchangePrecision], default="fp32", help="numbers on the network")
    parser.add_argument("--ratio", type=float, default=2.0, help="backward pass / exchange, replayed (default 2)")
    parser.add_argument("--channels", type=int, default=96, help="width of the first level (default 96)")
    parser.add_argument("--latent", type=int, default=32, help="side of the latents (default 32: 256 px)")
    parser.add_argument("--batch", type=int, default=1, help="samples of a rank in a step (default 1)")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


HEADER = (
    "method",
    "compute",
    "link",
    "MB",
    "exchange s",
    "processor s",
    "backward s",
    "step without s",
    "during s",
    "after s",
    "bound",
    "hidden",
)


def main() -> None:
    """Measure every link, and report."""
    args = parse()
    if args.rank is not None:
        run_rank(args)
        return
    if os.geteuid() != 0 or len(os.sched_getaffinity(0)) < NUM_RANKS:
        sys.exit("run this as root on two cores: it creates network namespaces, and each rank uses one core")
    # The namespaces are removed when the bench is stopped, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    names = ("rounds", "ratio", "channels", "latent", "batch", "precision")
    options = [word for name in names for word in (f"--{name}", str(getattr(args, name)))]
    options += ["--methods", *args.methods, "--compute", *args.compute]
    rows, result = [], {}
    different = 0
    for link in args.links:
        for found in run_ranks(LINKS[link], options):
            different += int(found["different"])
            result[f"{found['method']}_{link}_{found['compute']}"] = round(found["hidden"], 3)
            names = ("exchange", "processor", "backward", "without", "during", "after")
            shares = [f"{found['bound']:.0%}", f"{found['hidden']:.0%}"]
            times = [f"{found[name]:.2f}" for name in names]
            rows.append([found["method"], found["compute"], link, f"{found['bytes'] / 1e6:.0f}", *times, *shares])
            print(f"  {rows[-1]}", flush=True)
    finish(HEADER, rows, {**result, "different_bits": different})


if __name__ == "__main__":
    main()
