"""What interruptions of spot capacity cost: no operator, upstream practice, and this operator, on the same traces.

The real core runs in the simulated cluster: nodes are taken away and replaced as a trace says, and everything that is
not a matter of practice (nodes, images, loading, the time of a step and of a save) is the same for all three.

- none: nothing is saved; an interrupted run starts over.
- upstream: a checkpoint every 500 steps (the default of the diffusers scripts), SIGTERM ends the ranks, and the whole
  gang is started anew. Pods are deleted and made again at once: no back-off and no hung survivors are held against it.
- ours: checkpoints beside the loop at the interval that `auto` finds; all save on notice; survivors save when a peer
  dies suddenly; survivors keep their pods and go on with fewer nodes after `shrinkAfter`, until the new one stands by.

Goodput is the time of the steps that the model is made of, at full speed, over the time that the job took.

Where the figures come from:

- Interruptions: EC2's Spot Instance Advisor publishes the share of instances interrupted in a month by instance type,
  in bands from below 5 % to above 20 % (https://aws.amazon.com/ec2/spot/instance-advisor). GPU capacity is taken in
  bursts. The traces published with J. Thorpe et al., "Bamboo: Making Preemptible Instances Resilient for Affordable
  Training of Large DNNs" (NSDI 2023; doc/data of https://github.com/uclasystem/bamboo) hold 3 losses in 190 node hours
  of p2.xlarge (us-east-1e: 1.6 % an hour) and 85 in 200 node hours of g4dn.xlarge (us-east-1c: 43 % an hour). 10, 16
  and 33 % an hour are assumed, as points between these. A trace is a Poisson process of such a rate for each node: an
  assumption against all, for several nodes that go in one burst cost one restart.
- Notice: two minutes on EC2 (https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html).
  A tenth of the interruptions of a made trace come without any, as when hardware fails or the notice is missed: an
  assumption, and one that costs the upstream practice nothing.
- A replacement is asked for when the notice is given, and its node is ready after 60 s: an assumption that favours all
  alike. A GPU image of some gigabytes is pulled and unpacked in 150 s on a new node (8 GB at 55 MB/s); nodes
  keep it.
- Steps: ControlNet on SDXL, 190k images x 20 epochs in 3,306 min on 8 A100 (field reports) is 19 images a second: 1.7 s
  for a global batch of 32.
- Loading takes 60 s in a new pod (some gigabytes of weights from a shared file system, and the libraries) and 12 s in
  one that is kept or has stood by (libraries are imported, files are in the page cache); a save takes 3 s, of which
  ours holds up the steps for 0.3 s (it copies the state and writes beside the loop), upstream's for all of it. These
  are assumptions; each is a flag.

A CSV has the columns seconds, node and notice_seconds. The last line is JSON: the goodput of each, in the headline
scenario or the CSV's.
"""

from __future__ import annotations

import argparse
import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean

from finetune_contract.interval import auto_seconds, estimate_mtbf_seconds
from finetune_contract.phase import Phase
from finetune_operator.api.job import FineTuneJob, FineTuneJobStatus
from finetune_operator.plan.model.types import ObservedPod
from testing.measure.report import finish
from testing.simulated.model import Workload
from testing.simulated.world import SIMULATED, World

HOURS_PER_MONTH = 730.0
SCENARIOS = (
    ("Advisor, 20 % a month", 0.20 / HOURS_PER_MONTH),
    ("10 % an hour", 0.10),
    ("16 % an hour", 0.16),
    ("33 % an hour", 0.33),
)
"""The share of the nodes that is interrupted in an hour; where the rates come from is said above."""
HEADLINE = 2
"""The scenario of the JSON: upstream practice is below 0.85 there."""
NOTICE_SECONDS = 120.0
SUDDEN_SHARE = 0.1
HORIZON_FACTOR = 2.0
"""A job that takes so many times as long as an undisturbed one is given up."""


@dataclass(frozen=True)
class Setting:
    """What is the same for all practices."""

    num_nodes: int
    hours: float
    step_seconds: float
    save_seconds: float
    stall_seconds: float
    load_seconds: float
    warm_load_seconds: float
    pull_seconds: float
    provision_seconds: float

    @property
    def total_steps(self) -> int:
        """Steps of the job."""
        return int(self.hours * 3600 / self.step_seconds)


@dataclass(frozen=True)
class Interruption:
    """One node is taken away."""

    seconds: float
    node: int
    """Which of the nodes that are there, by age."""
    notice_seconds: float


@dataclass(frozen=True)
class Practice:
    """How a job is run. `save_steps` of None: as `auto` has it."""

    name: str
    save_steps: int | None
    is_ours: bool


@dataclass(frozen=True)
class Outcome:
    """What a job came to."""

    goodput: float
    lost_steps: int
    node_hours: float
    attempts: int


PRACTICES = (
    Practice("none", 10**9, is_ours=False),
    Practice("upstream", 500, is_ours=False),
    Practice("ours", None, is_ours=True),
)


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


def run(practice: Practice, trace: Sequence[Interruption], setting: Setting) -> Outcome:
    """Run one job through a trace."""
    settings = SIMULATED if practice.is_ours else replace(SIMULATED, hold_seconds=0)
    world = World("spot", Nobody(), setting.num_nodes, settings)
    world.kubelets.pull_seconds, world.kubelets.cached_seconds = setting.pull_seconds, 2.0
    work = _workload(practice, trace, setting)
    topology: dict[str, object] = {"accelerator": "cpu", "nodes": setting.num_nodes}
    recovery: dict[str, object] = {"noticeSeconds": int(NOTICE_SECONDS), "maxFailures": 1000}
    if practice.is_ours and setting.num_nodes > 1:
        topology = {"accelerator": "cpu", "minNodes": max(1, setting.num_nodes // 2), "maxNodes": setting.num_nodes}
        recovery["shrinkAfter"] = "5s"
    world.make_job("job", work, topology=topology, recovery=recovery)
    hours = _NodeHours(world)
    for interruption in trace:
        world.engine.after(interruption.seconds, partial(_interrupt, world, interruption, setting, hours))
    ideal = work.total_steps * work.step_seconds
    finished = (Phase.SUCCEEDED, Phase.FAILED)
    world.engine.run(HORIZON_FACTOR * ideal, stop=lambda: world.server.jobs["job"].status.phase in finished)
    status = world.server.jobs["job"].status
    kept = work.total_steps if status.phase is Phase.SUCCEEDED else 0
    trained = world.server.storage["job"].num_trained
    return Outcome(
        goodput=kept * work.step_seconds / world.engine.time,
        lost_steps=trained - kept,
        node_hours=hours.total(),
        attempts=status.attempt,
    )


def _workload(practice: Practice, trace: Sequence[Interruption], setting: Setting) -> Workload:
    save_steps = practice.save_steps
    if save_steps is None:
        # The interval at the middle of the run, by what has been seen of the trace by then: before an interruption with
        # notice all save anyway.
        half = setting.hours * 1800
        mtbf = estimate_mtbf_seconds(half, sum(item.seconds < half and not item.notice_seconds for item in trace))
        save_steps = max(1, round(auto_seconds(setting.stall_seconds, mtbf) / setting.step_seconds))
    return Workload(
        total_steps=setting.total_steps,
        step_seconds=setting.step_seconds,
        save_steps=min(save_steps, setting.total_steps),
        save_seconds=setting.save_seconds,
        stall_seconds=setting.stall_seconds if practice.is_ours else None,
        load_seconds=setting.load_seconds,
        warm_load_seconds=setting.warm_load_seconds,
        restore_seconds=3.0,
        full_size=setting.num_nodes,
        saves_on_notice=practice.is_ours,
        rescues=practice.is_ours,
    )


class _NodeHours:
    """Time of all nodes that are there, which is what is paid for."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._since = 0.0
        self._seconds = 0.0

    def note(self) -> None:
        """The number of nodes is about to change."""
        now = self._world.engine.time
        self._seconds += (now - self._since) * sum(node.up for node in self._world.server.nodes.values())
        self._since = now

    def total(self) -> float:
        """Node hours so far."""
        self.note()
        return self._seconds / 3600


def _interrupt(world: World, interruption: Interruption, setting: Setting, hours: _NodeHours) -> None:
    nodes = [node for node in world.server.nodes.values() if node.up and not node.leaving]
    if not nodes:
        return
    hours.note()
    node = nodes[interruption.node % len(nodes)]
    if interruption.notice_seconds > 0:
        world.kubelets.preempt(node, interruption.notice_seconds, tainted=False)
        world.engine.after(interruption.notice_seconds - 0.01, hours.note)
    else:
        world.kubelets.die(node, loud=True)
    # The capacity comes back as another machine, which is asked for when the first one is to go.
    world.engine.after(setting.provision_seconds, lambda: _add_node(world, hours))


def _add_node(world: World, hours: _NodeHours) -> None:
    hours.note()
    world.kubelets.add_node()


def main() -> None:
    """Run all three on the same traces and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, default=8, help="nodes of the job (default 8)")
    parser.add_argument("--hours", type=float, default=6.0, help="length of the undisturbed run (default 6)")
    parser.add_argument("--step-seconds", type=float, default=1.7, help="time of a step on all nodes (default 1.7)")
    parser.add_argument("--save-seconds", type=float, default=3.0, help="time of a save (default 3)")
    parser.add_argument("--stall-seconds", type=float, default=0.3, help="how long our save holds up the steps (0.3)")
    parser.add_argument("--load-seconds", type=float, default=60.0, help="loading in a new pod (default 60)")
    parser.add_argument("--warm-load-seconds", type=float, default=12.0, help="the same in a kept pod (default 12)")
    parser.add_argument("--pull-seconds", type=float, default=150.0, help="image pull on a new node (150)")
    parser.add_argument("--provision-seconds", type=float, default=60.0, help="until a replacement is there (60)")
    parser.add_argument("--price", type=float, default=1.0, help="price of a node hour (default 1)")
    parser.add_argument("--trace", type=Path, default=None, help="CSV with the columns seconds, node, notice_seconds")
    parser.add_argument("--seeds", type=int, default=2, help="made traces of each rate (default 2)")
    parser.add_argument("--scenario", type=int, default=None, help="only this rate, from 0")
    args = parser.parse_args()
    setting = Setting(
        args.nodes,
        args.hours,
        args.step_seconds,
        args.save_seconds,
        args.stall_seconds,
        args.load_seconds,
        args.warm_load_seconds,
        args.pull_seconds,
        args.provision_seconds,
    )
    rows: list[list[object]] = [["setting", name, value, "", "", "", ""] for name, value in vars(setting).items()]
    undisturbed = run(PRACTICES[-1], [], setting).goodput
    rows.append(["no interruption", "ours", round(undisturbed, 3), 1.0, 0, 1, ""])
    results = []
    for name, traces in _scenarios(args, setting):
        result = {}
        for practice in PRACTICES:
            outcomes = [run(practice, trace, setting) for trace in traces]
            goodput = round(mean(outcome.goodput for outcome in outcomes), 3)
            lost = round(mean(outcome.lost_steps for outcome in outcomes))
            attempts = round(mean(outcome.attempts for outcome in outcomes))
            node_hours = mean(outcome.node_hours for outcome in outcomes)
            share = round(goodput / undisturbed, 3)
            rows.append([name, practice.name, goodput, share, lost, attempts, round(node_hours * args.price, 1)])
            result[practice.name] = goodput
            print(f"  {name}: {practice.name}: goodput {goodput}", flush=True)
        results.append(result)
    finish(
        ["scenario", "practice", "goodput", "of undisturbed", "steps done again", "attempts", "cost"],
        rows,
        results[min(HEADLINE, len(results) - 1)],
    )


def _scenarios(args: argparse.Namespace, setting: Setting) -> list[tuple[str, list[list[Interruption]]]]:
    """Traces by the name of their scenario."""
    if args.trace is not None:
        return [(args.trace.name, [read_trace(args.trace)])]
    seconds = HORIZON_FACTOR * setting.hours * 3600
    chosen = SCENARIOS if args.scenario is None else (SCENARIOS[args.scenario],)
    return [
        (name, [make_trace(rate, setting.num_nodes, seconds, seed) for seed in range(args.seeds)])
        for name, rate in chosen
    ]


if __name__ == "__main__":
    main()
