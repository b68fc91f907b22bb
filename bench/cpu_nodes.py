"""A small version of the reference job on four nodes: does it survive a lost node, and how well does it scale?

`make bench-cpu-nodes`, as root on Linux. Network namespaces stand for nodes: 1 Gbit/s, 1 ms where the kernel can delay
packets, and the name of rank 0 is known late. Textual inversion on the demo's base, two ranks per node:

- 4 x 2: the job loses a node (both ranks are killed) in the middle, continues on four nodes and exports. Its weights
  must be those of the same job without a loss.
- 4 x 2 and 1 x 2 without a loss, with the same global batch, and a plain script with DDP under torchrun in both.

All ranks share the cores of this machine: with perfect scaling, four nodes are as fast as one. The scaling efficiency
is images/s of 4 x 2 / images/s of 1 x 2, so it shows the cost of the exchange and of more processes. Runs alternate,
and the medians count. oneCCL is measured where its binding is installed. The last line is JSON: {"survives_loss",
"efficiency", "plain_efficiency", ...}.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune_contract import environment
from finetune_contract.cpu.backend import CCL_BINDING
from finetune_contract.exit_codes import ExitCode
from finetune_contract.requirements import has_package
from finetune_contract.run_spec import RunSpec
from testing.measure.namespaces import ADDRESS, DEVICE, has_delay, switched
from testing.measure.report import finish
from testing.trainer.node_ranks import NodeRanks
from testing.trainer.ranks import free_port

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "examples/base-circles"
NODES, PER_NODE = 4, 2
SIZE = 64
BACKENDS = ("gloo", "ccl")


def make_spec(data: Path, steps: int, global_batch: int) -> RunSpec:
    """Return the job."""
    return RunSpec.model_validate(
        {
            "namespace": "default",
            "job": "shapes",
            "uid": "1f0c3a2b-0000-0000-0000-000000000000",
            "model": {"base": str(BASE)},
            "dataset": {"source": str(data)},
            "training": {
                "method": "TextualInversion",
                "textualInversion": {"placeholderToken": "<shape>", "initializerToken": "circle"},
                "steps": steps,
                "batchSize": global_batch,
                "resolution": SIZE,
                "learningRate": 1e-3,
            },
            "globalBatch": global_batch,
            "checkpointInterval": {"steps": steps},
            "outputs": [{"format": "diffusers", "to": str(data.parent / "out")}],
        }
    )


def train(spec: RunSpec, folder: Path, nodes: Sequence[str], attempt: int = 1, **options: Any) -> NodeRanks:
    """Run an attempt of the job to its end."""
    ranks = NodeRanks(spec, folder, attempt, PER_NODE * len(nodes), namespaces=nodes, **options).start()
    ranks.announce()
    ranks.wait()
    return ranks


def speed_of(spec: RunSpec, folder: Path, nodes: Sequence[str], backend: str) -> float:
    """Return the images/s at the end of an undisturbed job."""
    ranks = train(spec, folder, nodes, extra={environment.BACKEND: backend})
    if any(process.exitcode != ExitCode.DONE for process in ranks.processes):
        sys.exit(f"the job on {len(nodes)} nodes failed:\n{ranks.stderr()}")
    return float([report["imagesPerSecond"] for report in ranks.reports() if report.get("imagesPerSecond")][-1])


def survives_loss(spec: RunSpec, folder: Path, nodes: Sequence[str], backend: str, weights: bytes) -> bool:
    """Return whether a job that loses a node continues at the same step, and exports the same weights."""
    extra, steps = {environment.BACKEND: backend}, spec.training.steps or 0
    lost = train(spec, folder, nodes, extra=extra, lost_node=len(nodes) - 1, lost_at=steps // 2)
    survivors = [process.exitcode for process in lost.processes[:-PER_NODE]]
    rest = train(spec, folder, nodes, 2, extra=extra)
    restored = [report["restoredStep"] for report in rest.reports() if "restoredStep" in report]
    print(f"  {backend}: survivors of the loss exit with {set(survivors)}, step {restored[-1:]} restored", flush=True)
    return (
        set(survivors) == {ExitCode.FABRIC}
        and restored[-1:] == [steps // 2]
        and all(process.exitcode == ExitCode.DONE for process in rest.processes)
        and read_output(spec) == weights
    )


def read_output(spec: RunSpec) -> bytes:
    """Return the exported embedding."""
    return (Path(spec.outputs[0].to) / "learned_embeds.safetensors").read_bytes()


def plain_speed(nodes: Sequence[str], steps: int, global_batch: int) -> float:
    """Return the images/s of the plain script under torchrun."""
    port, size = str(free_port()), PER_NODE * len(nodes)
    launches = []
    for number, node in enumerate(nodes):
        command = ["ip", "netns", "exec", node, sys.executable, "-m", "torch.distributed.run"]
        command += ["--nnodes", str(len(nodes)), "--node-rank", str(number), "--nproc-per-node", str(PER_NODE)]
        command += ["--master-addr", ADDRESS.format(1), "--master-port", port, "-m", "bench.cpu_nodes_plain", str(BASE)]
        command += ["--batch", str(global_batch // size), "--steps", str(steps), "--size", str(SIZE)]
        env = {**os.environ, "GLOO_SOCKET_IFNAME": DEVICE, "OMP_NUM_THREADS": "1"}
        env |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        launches.append(subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True))
    try:
        outputs = [launch.communicate()[0] for launch in launches]
    finally:
        for launch in launches:
            launch.kill()
    if any(launch.returncode for launch in launches):
        sys.exit("the plain script failed")
    (line,) = [line for line in outputs[0].splitlines() if line.startswith("{")]
    return float(json.loads(line)["images_per_second"])


def measure(backend: str, args: argparse.Namespace, folder: Path, nodes: Sequence[str]) -> dict[str, Any]:
    """Return the speeds of the job on one and on all nodes, and whether it survives a loss."""
    spec = make_spec(folder / "data", args.steps, args.batch)
    speeds: dict[int, list[float]] = {1: [], len(nodes): []}
    for number in range(args.rounds):
        for count, found in speeds.items():
            found.append(speed_of(spec, folder / f"{backend}-{count}-{number}", nodes[:count], backend))
            print(f"  {backend}, {count} x {PER_NODE}: {found[-1]:.1f} images/s", flush=True)
    survived = survives_loss(spec, folder / f"{backend}-lost", nodes, backend, read_output(spec))
    one, all_nodes = (statistics.median(found) for found in speeds.values())
    return {"one": one, "all": all_nodes, "survived": survived}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="steps of a run (default 60; the reference job has 200)")
    parser.add_argument("--batch", type=int, default=32, help="global batch (default 32)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each configuration (default 3)")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, and report."""
    args = parse()
    if os.geteuid() != 0:
        sys.exit("run this as root: it creates network namespaces")
    # Ranks that end at once leave locks of libraries behind, about which Python would warn after the last line.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    # The namespaces are removed when the bench is stopped, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    rows, result = [], {}
    with tempfile.TemporaryDirectory(prefix="bench-nodes-") as name, switched("bench", NODES, "1gbit", "1ms") as nodes:
        folder = Path(name)
        make = [sys.executable, "-m", "finetune_trainer.demo.circles", str(folder / "data"), "--style", "stripes"]
        subprocess.run([*make, "--num-train", "64", "--num-validation", "8"], check=True)
        delay = "1 ms" if has_delay(nodes[0]) else "no delay: this kernel has no netem"
        print(f"{NODES} nodes with {PER_NODE} ranks each on {os.cpu_count()} cores; 1 Gbit/s, {delay}", flush=True)
        for backend in BACKENDS:
            if backend == "ccl" and not has_package(CCL_BINDING):
                print(f"  ccl: not measured, {CCL_BINDING} is not installed", flush=True)
                continue
            found = measure(backend, args, folder, nodes)
            key = "" if backend == "gloo" else f"{backend}_"
            result[f"{key}survives_loss"] = found["survived"]
            result[f"{key}efficiency"] = round(found["all"] / found["one"], 3)
            rows.append([backend, found["one"], found["all"], found["all"] / found["one"]])
        plain: dict[int, list[float]] = {1: [], NODES: []}
        for _ in range(args.rounds):
            for count, speeds in plain.items():
                speeds.append(plain_speed(nodes[:count], args.steps, args.batch))
                print(f"  torchrun with DDP, {count} x {PER_NODE}: {speeds[-1]:.1f} images/s", flush=True)
        one, all_nodes = (statistics.median(speeds) for speeds in plain.values())
        rows.append(["torchrun with DDP", one, all_nodes, all_nodes / one])
        result["plain_efficiency"] = round(all_nodes / one, 3)
        result["delay_ms"] = int(has_delay(nodes[0]))
    texts = [[row[0], f"{row[1]:.1f}", f"{row[2]:.1f}", f"{row[3]:.2f}"] for row in rows]
    finish(("program", "images/s on 1 x 2", f"on {NODES} x {PER_NODE}", "efficiency"), texts, result)


if __name__ == "__main__":
    main()
