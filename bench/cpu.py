"""Speed of training on CPUs: libraries, number formats, ranks and threads, pinning, and gradients on the wire.

`make bench-cpu`, in the environment of `make test-intel`. The methods train the SD 1.5 architecture at a fraction of
its width with random weights. Each configuration is a group of rank processes that wait for their turn: in every round
each group trains a few steps, one group at a time. All groups use the same two cores. The configurations of one rank
are measured before those of two ranks, which need more memory (12 GB); "auto" is measured with both.

- native and IPEX, in fp32 and bf16: one rank of two threads. "auto" is what `topology.cpu.ipex: auto` chooses by its
  measurement of the layers, without knowledge of these readings.
- one rank of two threads and two ranks of one thread, with the same global batch.
- two ranks, each pinned to its core as the supervisor does, and both on both cores.
- two ranks that train all weights, with gradients in fp32 and in bf16 on the wire (gloo, loopback).

The table has the medians of the rounds, and the best round. Ratios are those of the best rounds, because other load on
the machine only adds time. The last line is JSON: {"auto_over_best": time of auto / time of the fastest path, the
largest of the methods, "pinned_speedup": unpinned / pinned, ...}. Options::

    python -m bench.cpu --methods TextualInversion --rounds 3 --channels 64
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from finetune_contract.spec import ExchangePrecision, Precision
from finetune_trainer.distributed.world import World
from finetune_trainer.intel.extension import unavailable_reason
from finetune_trainer.intel.paths import ComputePath, fastest
from finetune_trainer.intel.processor import this_processor
from finetune_trainer.methods.registry import method_class
from finetune_trainer.train.tuning.layer_probe import count_layers, make_request
from finetune_trainer.train.tuning.processor import parse_measurement, run_probe
from testing.measure.cpu_ratios import (
    Configuration,
    Readings,
    all_paths,
    combine,
    configurations,
    measured_together,
    summarize,
)
from testing.measure.cpu_step import CPU, METHODS, CpuStep, NarrowFamily, StepSettings
from testing.measure.report import finish

CORES = 2
GLOBAL_BATCH = 2


def choose_auto(method: str, paths: Sequence[ComputePath], args: argparse.Namespace, folder: Path) -> ComputePath:
    """Return what the trainer chooses for a method."""
    family = NarrowFamily(args.channels, folder)
    settings = StepSettings(method, paths[0], GLOBAL_BATCH, args.size)
    counts = count_layers(family, settings.training)
    is_trained = method_class(settings.training.method).trains_denoiser()
    seconds = parse_measurement(run_probe(make_request(counts, paths, is_trained)))
    if not seconds:
        sys.exit("the processor could not be measured")
    text = ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in seconds.items())
    print(f"  {method}: the probe measures {text}", flush=True)
    return fastest([path for path in paths if path.name in seconds], seconds)


class Group:
    """The rank processes of a configuration.

    Args:
        configuration: what they train.
        args: the options.
        folder: for the meeting of the ranks.
    """

    def __init__(self, configuration: Configuration, args: argparse.Namespace, folder: Path) -> None:
        self.configuration = configuration
        cores = sorted(os.sched_getaffinity(0))[:CORES]
        each = CORES // configuration.num_ranks
        store = folder / f"{configuration.method} {configuration.name}"
        self._ranks = []
        for rank in range(configuration.num_ranks):
            own = cores[rank * each : (rank + 1) * each] if configuration.is_pinned else cores
            command = ["taskset", "--cpu-list", ",".join(map(str, own)), sys.executable, "-m", "bench.cpu"]
            command += ["--rank", str(rank), "--store", str(store), "--configuration", configuration.to_json()]
            command += ["--channels", str(args.channels), "--size", str(args.size)]
            env = {**os.environ, "OMP_NUM_THREADS": str(each), "GLOO_SOCKET_IFNAME": "lo"}
            env["TRANSFORMERS_VERBOSITY"] = env["DIFFUSERS_VERBOSITY"] = "error"
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self._ranks.append(subprocess.Popen(command, env=env, **pipes))

    def run(self, num_steps: int) -> float:
        """Return the seconds of a step of the slowest rank, the mean of some steps."""
        for rank in self._ranks:
            assert rank.stdin is not None
            rank.stdin.write(f"{num_steps}\n")
            rank.stdin.flush()
        return max(self._read(rank) for rank in self._ranks)

    def _read(self, rank: subprocess.Popen[str]) -> float:
        assert rank.stdout is not None
        for line in rank.stdout:
            if line.startswith("{"):
                return float(json.loads(line)["seconds"])
        sys.exit(f"a rank of {self.configuration.name} failed")

    def close(self) -> None:
        """End the processes."""
        for rank in self._ranks:
            rank.kill()
            rank.wait()


def run_rank(args: argparse.Namespace) -> None:
    """Train as one rank: for each line of stdin as many steps as it says."""
    values = json.loads(args.configuration)
    torch.set_num_threads(CORES // values["ranks"])
    path = ComputePath(Precision(values["precision"]), values["ipex"])
    wire = ExchangePrecision(values["wire"])
    batch = GLOBAL_BATCH // values["ranks"]
    if values["ranks"] > 1:
        files = dist.FileStore(args.store, values["ranks"])  # type: ignore[attr-defined]
        dist.init_process_group("gloo", rank=args.rank, world_size=values["ranks"], store=files)
    world = World(args.rank, values["ranks"], 0, CPU)
    with tempfile.TemporaryDirectory() as folder:
        family = NarrowFamily(args.channels, Path(folder))
        step = CpuStep(family, StepSettings(values["method"], path, batch, args.size, wire), world)
    for line in sys.stdin:
        seconds = [step.run() for _ in range(int(line))]
        print(json.dumps({"seconds": statistics.mean(seconds)}), flush=True)


@contextlib.contextmanager
def started(group: Sequence[Configuration], args: argparse.Namespace, folder: Path) -> Iterator[list[Group]]:
    """Start the groups one after the other, each with a first step that does not count; end them at the end."""
    groups: list[Group] = []
    try:
        for configuration in group:
            groups.append(Group(configuration, args, folder))
            groups[-1].run(1)
            print(f"  {configuration.method}, {configuration.name}: ready", flush=True)
        yield groups
    finally:
        for each in groups:
            each.close()


def measure(method: str, args: argparse.Namespace, folder: Path) -> tuple[ComputePath, Readings]:
    """Return the path that auto chooses, and the readings of all configurations of a method."""
    paths = all_paths(has_ipex=not unavailable_reason())
    auto = choose_auto(method, paths, args, folder)
    readings: dict[str, list[float]] = {}
    for title, part in measured_together(configurations(method, paths, auto), auto).items():
        with started(part, args, folder) as groups:
            for number in range(args.rounds):
                for group in groups:
                    readings.setdefault(group.configuration.name, []).append(group.run(args.steps))
                print(f"  {method}, {title}: round {number + 1} of {args.rounds}", flush=True)
    return auto, readings


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["TextualInversion", "Full"])
    parser.add_argument("--rounds", type=int, default=7, help="readings of each configuration (default 7)")
    parser.add_argument("--steps", type=int, default=2, help="steps of a reading (default 2)")
    parser.add_argument("--channels", type=int, default=96, help="width of the first level (default 96)")
    parser.add_argument("--size", type=int, default=256, help="side of the images in pixels (default 256)")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    parser.add_argument("--configuration", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    """Measure all methods, and report."""
    args = parse()
    if args.rank is not None:
        run_rank(args)
        return
    if len(os.sched_getaffinity(0)) < CORES:
        sys.exit("this benchmark needs two cores")
    torch.set_num_threads(CORES)
    processor = this_processor()
    print(f"{processor.name or 'unknown processor'}, {processor.instructions}; torch {torch.__version__}", flush=True)
    rows, found = [], {}
    with tempfile.TemporaryDirectory(prefix="bench-cpu-") as folder:
        for method in args.methods:
            auto, readings = measure(method, args, Path(folder))
            found[method] = summarize(auto, readings)
            for name, seconds in readings.items():
                mark = "auto" if name == auto.name else ""
                rows.append([method, name, f"{statistics.median(seconds):.3f}", f"{min(seconds):.3f}", mark])
    finish(("method", "configuration", "median s", "best s", "chosen"), rows, combine(found))


if __name__ == "__main__":
    main()
