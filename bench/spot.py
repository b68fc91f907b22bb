"""What interruptions of spot capacity cost: no operator, upstream practice, and this operator, on the same traces.

The real core runs in the simulated cluster: nodes are taken away and replaced as a trace says, everything else is the
same for all three.

- none: nothing is saved; an interrupted run starts over.
- upstream: a checkpoint every 500 steps, SIGTERM ends the ranks, and the whole gang is started anew.
- ours: checkpoints at the interval that `auto` finds, all save on notice, and only the lost pod is replaced.

Goodput is the time of the steps that the model is made of, over the time that the job took. A trace is made from a
rate of interruptions, or read from a CSV (columns seconds, node, notice_seconds). The last line is JSON: the goodput
of each.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from bench.report import finish
from finetune_operator.api.job import FineTuneJob, FineTuneJobStatus, Phase
from finetune_operator.cluster.simulated.model import Workload
from finetune_operator.cluster.simulated.world import SIMULATED, World
from finetune_operator.plan.types import ObservedPod

NOTICE_SECONDS = 120.0
"""Amazon's notice; a trace may have others."""
SUDDEN_SHARE = 0.1
"""Interruptions of a made trace that come without notice."""
PROVISION_SECONDS = 30.0
PULL_SECONDS = 30.0
HORIZON_FACTOR = 4.0
"""A job that takes so many times as long as an undisturbed one is given up."""


@dataclass(frozen=True)
class Interruption:
    """One node is taken away."""

    seconds: float
    node: int
    """Which of the nodes that are there, by age."""
    notice_seconds: float


@dataclass(frozen=True)
class Practice:
    """How a job is run."""

    name: str
    save_steps: int
    saves_on_notice: bool
    in_place: bool


@dataclass(frozen=True)
class Outcome:
    """What a job came to."""

    goodput: float
    lost_steps: int
    node_hours: float
    attempts: int


class Nobody:
    """A watchdog that looks at nothing."""

    def status_written(self, job: FineTuneJob, new: FineTuneJobStatus) -> None:
        """Nothing to see."""

    def pod_created(self, job: FineTuneJob, pod: ObservedPod) -> None:
        """Nothing to see."""

    def pod_deleted(self, job: FineTuneJob, pod: ObservedPod) -> None:
        """Nothing to see."""

    def committed(self, job_name: str, attempt: int, step: int) -> None:
        """Nothing to see."""


def make_trace(rate_per_hour: float, num_nodes: int, seconds: float, seed: int) -> list[Interruption]:
    """Interruptions as a Poisson process: each node is taken at this rate, whatever its age."""
    rng = random.Random(seed)
    trace, now = [], 0.0
    while (now := now + rng.expovariate(rate_per_hour * num_nodes / 3600)) < seconds:
        notice = 0.0 if rng.random() < SUDDEN_SHARE else NOTICE_SECONDS
        trace.append(Interruption(now, rng.randrange(num_nodes), notice))
    return trace


def read_trace(path: Path) -> list[Interruption]:
    """Read a trace from a CSV with the columns seconds, node and notice_seconds."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Interruption(float(row["seconds"]), int(row["node"]), float(row["notice_seconds"]))
            for row in csv.DictReader(file)
        ]


def run(practice: Practice, trace: Sequence[Interruption], workload: Workload, num_nodes: int) -> Outcome:
    """Run one job through a trace."""
    settings = SIMULATED if practice.in_place else replace(SIMULATED, hold_seconds=0)
    world = World("spot", Nobody(), num_nodes, settings)
    world.kubelets.pull_seconds = PULL_SECONDS
    work = replace(workload, save_steps=practice.save_steps, saves_on_notice=practice.saves_on_notice)
    topology = {"accelerator": "cpu", "nodes": num_nodes}
    world.make_job("job", work, topology=topology, recovery={"noticeSeconds": int(NOTICE_SECONDS), "maxFailures": 100})
    for interruption in trace:
        world.engine.after(interruption.seconds, partial(_interrupt, world, interruption))
    ideal = work.total_steps * work.step_seconds
    finished = (Phase.SUCCEEDED, Phase.FAILED)
    world.engine.run(HORIZON_FACTOR * ideal, stop=lambda: world.server.jobs["job"].status.phase in finished)
    status = world.server.jobs["job"].status
    kept = work.total_steps if status.phase is Phase.SUCCEEDED else 0
    seconds = world.engine.time
    trained = world.server.storage["job"].num_trained
    return Outcome(
        goodput=round(kept * work.step_seconds / seconds, 3),
        lost_steps=trained - kept,
        node_hours=round(seconds * num_nodes / 3600, 1),
        attempts=status.attempt,
    )


def _interrupt(world: World, interruption: Interruption) -> None:
    nodes = [node for node in world.server.nodes.values() if node.up and not node.leaving]
    if not nodes:
        return
    node = nodes[interruption.node % len(nodes)]
    if interruption.notice_seconds > 0:
        world.kubelets.preempt(node, interruption.notice_seconds, tainted=False)
    else:
        world.kubelets.die(node, loud=True)
    # The capacity comes back as another machine, which the autoscaler asks for when the first one is to go.
    world.engine.after(PROVISION_SECONDS, lambda: _add_node(world))


def _add_node(world: World) -> None:
    world.kubelets.add_node()


def main() -> None:
    """Run all three on the same trace and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, default=8, help="nodes of the job (default 8)")
    parser.add_argument("--rate", type=float, default=0.10, help="share of the nodes taken in an hour (default 0.10)")
    parser.add_argument("--hours", type=float, default=8.0, help="length of the undisturbed run (default 8)")
    parser.add_argument("--step-seconds", type=float, default=2.0, help="time of a step (default 2)")
    parser.add_argument("--price", type=float, default=1.0, help="price of a node hour (default 1)")
    parser.add_argument("--trace", type=Path, default=None, help="CSV with the columns seconds, node, notice_seconds")
    parser.add_argument("--seed", type=int, default=0, help="seed of a made trace (default 0)")
    args = parser.parse_args()
    ideal = args.hours * 3600
    workload = Workload(
        total_steps=int(ideal / args.step_seconds),
        step_seconds=args.step_seconds,
        save_seconds=3.0,
        load_seconds=20.0,
        restore_seconds=5.0,
    )
    made = make_trace(args.rate, args.nodes, HORIZON_FACTOR * ideal, args.seed)
    trace = read_trace(args.trace) if args.trace else made
    practices = (
        Practice("none", workload.total_steps, saves_on_notice=False, in_place=False),
        Practice("upstream", 500, saves_on_notice=False, in_place=False),
        Practice("ours", _auto_steps(workload, args.rate * args.nodes), saves_on_notice=True, in_place=True),
    )
    rows: list[list[object]] = []
    result = {}
    for practice in practices:
        outcome = run(practice, trace, workload, args.nodes)
        cost = round(outcome.node_hours * args.price, 1)
        rows.append([practice.name, outcome.goodput, outcome.lost_steps, outcome.attempts, outcome.node_hours, cost])
        result[practice.name] = outcome.goodput
        print(f"  {practice.name}: goodput {outcome.goodput}", flush=True)
    finish(["practice", "goodput", "steps done again", "attempts", "node hours", "cost"], rows, result)


def _auto_steps(workload: Workload, losses_per_hour: float) -> int:
    """Steps between checkpoints by Young and Daly, as the trainer's `auto` takes them."""
    mtbf_seconds = 3600 / losses_per_hour if losses_per_hour else 1e9
    best = math.sqrt(2 * workload.save_seconds * mtbf_seconds) - workload.save_seconds
    return max(1, round(min(1800.0, max(10.0, best)) / workload.step_seconds))


if __name__ == "__main__":
    main()
