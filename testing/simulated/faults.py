"""What goes wrong in the simulation, drawn from one seed: nodes, processes, networks, the API and the operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import RankState
from testing.simulated.model import Node
from testing.simulated.world import World

PROGRAM_ENDS = ((1, "Traceback"), (70, "ValueError: bad"), (137, ""), (ExitCode.STORAGE, "No space left on device"))


@dataclass(frozen=True)
class Fault:
    """One kind of mishap and how often it is drawn."""

    weight: float
    cause: Callable[[World], None]


def _some_node(world: World) -> Node | None:
    nodes = [node for node in world.server.nodes.values() if node.up]
    return world.engine.rng.choice(nodes) if nodes else None


def preempt(world: World) -> None:
    """A node is taken away with notice, which may be too short."""
    if (node := _some_node(world)) is not None:
        rng = world.engine.rng
        world.kubelets.preempt(node, rng.choice([5.0, 30.0, 120.0]), tainted=rng.random() < 0.3)
        world.replace_node_later()


def die(world: World) -> None:
    """A node stops without a word."""
    if (node := _some_node(world)) is not None:
        world.kubelets.die(node, loud=world.engine.chance(0.5))
        world.replace_node_later()


def vanish(world: World) -> None:
    """A node and its Node object are gone at once."""
    if (node := _some_node(world)) is not None:
        world.kubelets.remove_node(node)
        world.replace_node_later()


def cut_node_off(world: World) -> None:
    """The control plane loses a node whose pods run on."""
    if (node := _some_node(world)) is not None:
        world.kubelets.disconnect(node, world.engine.rng.choice([10.0, 100.0, 1000.0]))


def take_quota(world: World) -> None:
    """Several nodes go at once, and come back much later."""
    rng = world.engine.rng
    for _ in range(rng.randint(1, 6)):
        if (node := _some_node(world)) is not None:
            world.kubelets.preempt(node, 30.0, tainted=False)
    world.engine.after(rng.uniform(60, 3600), world.fill_up)


def change_capacity(world: World) -> None:
    """Spot nodes become scarce for hours, or plenty."""
    rng = world.engine.rng
    world.num_nodes = rng.randint(0, world.normal_num_nodes + 2)
    world.fill_up()
    num_there = [node for node in world.server.nodes.values() if node.up and node.spot]
    for node in num_there[world.num_nodes :]:
        world.kubelets.preempt(node, rng.choice([5.0, 30.0, 120.0]), tainted=False)
    world.engine.after(rng.uniform(600, 4 * 3600), lambda: _restore_capacity(world))


def _restore_capacity(world: World) -> None:
    world.num_nodes = max(world.num_nodes, world.normal_num_nodes)
    world.fill_up()


def set_quota(world: World) -> None:
    """An administrator bounds the number of pods for a while; those that are there stay."""
    rng = world.engine.rng
    world.server.quota = rng.randint(0, world.normal_num_nodes)
    world.engine.after(rng.uniform(60, 3600), lambda: setattr(world.server, "quota", None))


def stall_pulls(world: World) -> None:
    """The registry is slow for a while."""
    world.kubelets.pull_seconds = 900.0
    world.engine.after(world.engine.rng.uniform(60, 1800), lambda: setattr(world.kubelets, "pull_seconds", 5.0))


def fail_program(world: World) -> None:
    """A rank ends with an error of its own."""
    rng = world.engine.rng
    if (supervisor := world.some_supervisor()) is not None:
        code, words = rng.choice(PROGRAM_ENDS)
        reason = "OOMKilled" if code == 137 and rng.random() < 0.5 else None
        world.count_failure(supervisor.pod.job)
        supervisor.fail(code, words, reason)


def break_fabric(world: World) -> None:
    """A connection between two ranks is reset, and no pod is to blame."""
    if (supervisor := world.some_supervisor()) is not None and supervisor.gang is not None:
        world.count_failure(supervisor.pod.job)
        for member in list(supervisor.gang.members.values()):
            member.fail(ExitCode.FABRIC, "Connection reset by peer")


def hang(world: World) -> None:
    """The ranks of a gang wait for each other for ever."""
    supervisor = world.some_supervisor()
    gang = supervisor.gang if supervisor is not None else None
    if supervisor is not None and gang is not None and gang.state is RankState.TRAINING and not gang.broken:
        world.count_failure(supervisor.pod.job)
        gang.hang()


def evict_pod(world: World) -> None:
    """Somebody drains a node, or deletes a pod."""
    rng = world.engine.rng
    pods = list(world.server.pods.values())
    if pods:
        world.server.evict(rng.choice(pods), rng.choice([None, "EvictionByEvictionAPI", "PreemptionByScheduler"]))


def restart_operator(world: World) -> None:
    """The operator's process ends, in the middle of whatever it does."""
    world.restart_operator(world.engine.rng.choice([1.0, 15.0, 300.0]))


def break_watch(world: World) -> None:
    """Events get lost until the next list."""
    if world.operator is not None:
        world.operator.break_watch(world.engine.rng.choice([0.1, 5.0, 60.0]))


def lag(world: World) -> None:
    """Events come late for a while."""
    if world.operator is not None:
        world.operator.watch.lag_seconds = world.engine.rng.choice([0.02, 0.1, 2.0, 20.0])


def bad_weather(world: World) -> None:
    """Calls are slow and fail for a while."""
    rng = world.engine.rng
    world.weather.seconds = rng.choice([0.01, 0.5, 5.0])
    world.weather.failing = rng.choice([0.0, 0.1, 0.9])
    world.weather.lost = rng.choice([0.0, 0.1, 0.5])
    world.engine.after(rng.uniform(5, 120), world.good_weather)


def partition(world: World) -> None:
    """Beats of some jobs' pods do not come through."""
    rng = world.engine.rng
    world.deaf_until = world.engine.time + rng.choice([20.0, 90.0, 600.0])
    world.deaf_share = rng.choice([0.1, 0.5, 1.0])


def suspend(world: World) -> None:
    """A user suspends a job, and resumes it some time later."""
    rng = world.engine.rng
    names = list(world.server.jobs)
    if names:
        name = rng.choice(names)
        world.set_suspend(name, True)
        world.engine.after(rng.uniform(1, 600), lambda: world.set_suspend(name, False))


def delete_job(world: World) -> None:
    """A user deletes a job, and makes another one of the same name."""
    names = list(world.server.jobs)
    if names:
        world.remake_job(world.engine.rng.choice(names))


FAULTS = (
    Fault(5, preempt),
    Fault(2, die),
    Fault(2, vanish),
    Fault(2, cut_node_off),
    Fault(0.5, take_quota),
    Fault(0.5, change_capacity),
    Fault(0.3, set_quota),
    Fault(0.3, stall_pulls),
    Fault(4, fail_program),
    Fault(1, break_fabric),
    Fault(1, hang),
    Fault(2, evict_pod),
    Fault(1, restart_operator),
    Fault(1, break_watch),
    Fault(1, lag),
    Fault(1, bad_weather),
    Fault(1, partition),
    Fault(0.5, suspend),
    Fault(0.2, delete_job),
)
"""The mishaps and their weights."""


def cause_one(world: World) -> str:
    """Let one mishap happen; return its name."""
    weights = [fault.weight for fault in FAULTS]
    fault = world.engine.rng.choices(FAULTS, weights)[0]
    fault.cause(world)
    return fault.cause.__name__
