"""The faults of the simulation, drawn from one seed: nodes, processes, networks, the API server and the operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from finetune_contract.exit_codes import OOM_KILL, ExitCode
from finetune_contract.heartbeat import GpuFault, RankState
from finetune_operator.plan.model.types import PodPhase
from testing.simulated.cluster import SimulatedCluster
from testing.simulated.model import SimulatedNode

PROGRAM_ENDS = ((1, "Traceback"), (70, "ValueError: bad"), (137, ""), (ExitCode.STORAGE, "No space left on device"))
"""Exit codes and last output of ranks that fail by themselves."""
FALLEN_GPU = GpuFault(uuid="GPU-0", xid=79, message="GPU GPU-0: XID 79, the GPU has fallen off the bus")


@dataclass(frozen=True)
class SimulatedFault:
    """One kind of fault."""

    weight: float
    """Its relative frequency."""
    inject: Callable[[SimulatedCluster], None]


def _random_node(cluster: SimulatedCluster) -> SimulatedNode | None:
    nodes = [node for node in cluster.server.nodes.values() if node.up]
    return cluster.engine.rng.choice(nodes) if nodes else None


def preempt(cluster: SimulatedCluster) -> None:
    """Preempt a node with a notice, which may be too short."""
    if (node := _random_node(cluster)) is not None:
        rng = cluster.engine.rng
        cluster.kubelets.preempt(node, rng.choice([5.0, 30.0, 120.0]), tainted=rng.random() < 0.3)
        cluster.replace_node_later()


def stop_node(cluster: SimulatedCluster) -> None:
    """Stop a node without notice."""
    if (node := _random_node(cluster)) is not None:
        cluster.kubelets.stop_node(node, loud=cluster.engine.chance(0.5))
        cluster.replace_node_later()


def remove_node(cluster: SimulatedCluster) -> None:
    """Remove a machine and its Node at the same time."""
    if (node := _random_node(cluster)) is not None:
        cluster.kubelets.remove_node(node)
        cluster.replace_node_later()


def disconnect_node(cluster: SimulatedCluster) -> None:
    """Disconnect a node from the control plane while its pods keep running."""
    if (node := _random_node(cluster)) is not None:
        cluster.kubelets.disconnect(node, cluster.engine.rng.choice([10.0, 100.0, 1000.0]))


def reclaim_nodes(cluster: SimulatedCluster) -> None:
    """Preempt several nodes at once, and replace them much later."""
    rng = cluster.engine.rng
    for _ in range(rng.randint(1, 6)):
        if (node := _random_node(cluster)) is not None:
            cluster.kubelets.preempt(node, 30.0, tainted=False)
    cluster.engine.after(rng.uniform(60, 3600), cluster.add_missing_nodes)


def change_capacity(cluster: SimulatedCluster) -> None:
    """Change the number of available spot nodes for hours."""
    rng = cluster.engine.rng
    cluster.num_nodes = rng.randint(0, cluster.normal_num_nodes + 2)
    cluster.add_missing_nodes()
    spot_nodes = [node for node in cluster.server.nodes.values() if node.up and node.spot]
    for node in spot_nodes[cluster.num_nodes :]:
        cluster.kubelets.preempt(node, rng.choice([5.0, 30.0, 120.0]), tainted=False)
    cluster.engine.after(rng.uniform(600, 4 * 3600), lambda: _restore_capacity(cluster))


def _restore_capacity(cluster: SimulatedCluster) -> None:
    cluster.num_nodes = max(cluster.num_nodes, cluster.normal_num_nodes)
    cluster.add_missing_nodes()


def set_quota(cluster: SimulatedCluster) -> None:
    """Limit the number of pods for a while; existing pods stay."""
    rng = cluster.engine.rng
    cluster.server.quota = rng.randint(0, cluster.normal_num_nodes)
    cluster.engine.after(rng.uniform(60, 3600), lambda: setattr(cluster.server, "quota", None))


def stall_pulls(cluster: SimulatedCluster) -> None:
    """Slow down image pulls for a while."""
    cluster.kubelets.pull_seconds = 900.0
    cluster.engine.after(cluster.engine.rng.uniform(60, 1800), lambda: setattr(cluster.kubelets, "pull_seconds", 5.0))


def refuse_pods(cluster: SimulatedCluster) -> None:
    """Let the kubelet of a node refuse pods for a while."""
    if (node := _random_node(cluster)) is not None:
        node.refuses = True
        cluster.engine.after(cluster.engine.rng.uniform(60, 1800), lambda: setattr(node, "refuses", False))


def fail_init_container(cluster: SimulatedCluster) -> None:
    """Fail an init container of a pod that starts on its node."""
    pods = [pod for pod in cluster.server.pods.values() if pod.node is not None and pod.node.connected]
    starting = [pod for pod in pods if pod.observed.phase is PodPhase.PENDING and pod.observed.deleted_at is None]
    if starting:
        pod = cluster.engine.rng.choice(starting)
        cluster.count_failure(pod.job)
        cluster.kubelets.fail_start(pod)


def edit_template(cluster: SimulatedCluster) -> None:
    """Edit the podTemplate of a job."""
    names = list(cluster.server.jobs)
    if names:
        cluster.edit_template(cluster.engine.rng.choice(names))


def fail_program(cluster: SimulatedCluster) -> None:
    """End a rank with an error of its program."""
    rng = cluster.engine.rng
    if (supervisor := cluster.random_supervisor()) is not None:
        code, output = rng.choice(PROGRAM_ENDS)
        cluster.count_failure(supervisor.pod.job)
        supervisor.fail(code, output)


def exceed_memory(cluster: SimulatedCluster) -> None:
    """Let the kernel end a rank that exceeds the memory of its pod, alone or with its supervisor."""
    if (supervisor := cluster.random_supervisor()) is not None:
        cluster.count_failure(supervisor.pod.job)
        if cluster.engine.chance(0.5):
            supervisor.fail(137, f"{OOM_KILL}, whose memory limit is 1024 MiB")
        else:
            supervisor.kill_container()


def break_gpu(cluster: SimulatedCluster) -> None:
    """Let a GPU fail: its driver reports it, and the rank ends with an error. It must not count as a failure."""
    if (supervisor := cluster.random_supervisor()) is not None:
        supervisor.fail(ExitCode.SOFTWARE, "CUDA error: unspecified launch failure", gpu_fault=FALLEN_GPU)


def break_fabric(cluster: SimulatedCluster) -> None:
    """Reset the connections between the ranks of a gang; no pod is at fault."""
    if (supervisor := cluster.random_supervisor()) is not None and supervisor.gang is not None:
        cluster.count_failure(supervisor.pod.job)
        for member in list(supervisor.gang.members.values()):
            member.fail(ExitCode.FABRIC, "Connection reset by peer")


def hang(cluster: SimulatedCluster) -> None:
    """Let the ranks of a gang wait for each other forever."""
    supervisor = cluster.random_supervisor()
    gang = supervisor.gang if supervisor is not None else None
    if supervisor is not None and gang is not None and gang.state is RankState.TRAINING and not gang.broken:
        cluster.count_failure(supervisor.pod.job)
        gang.hang()


def evict_pod(cluster: SimulatedCluster) -> None:
    """Evict or delete a pod."""
    rng = cluster.engine.rng
    pods = list(cluster.server.pods.values())
    if pods:
        cluster.server.evict(rng.choice(pods), rng.choice([None, "EvictionByEvictionAPI", "PreemptionByScheduler"]))


def restart_operator(cluster: SimulatedCluster) -> None:
    """Kill the operator's process at any point of its work."""
    cluster.restart_operator(cluster.engine.rng.choice([1.0, 15.0, 300.0]))


def break_watch(cluster: SimulatedCluster) -> None:
    """Lose watch events until the next list."""
    if cluster.operator is not None:
        cluster.operator.break_watch(cluster.engine.rng.choice([0.1, 5.0, 60.0]))


def delay_watch(cluster: SimulatedCluster) -> None:
    """Change the delay of watch events."""
    if cluster.operator is not None:
        cluster.operator.watch.lag_seconds = cluster.engine.rng.choice([0.02, 0.1, 2.0, 20.0])


def degrade_api(cluster: SimulatedCluster) -> None:
    """Make calls to the API server slow and unreliable for a while."""
    rng = cluster.engine.rng
    cluster.api.seconds = rng.choice([0.01, 0.5, 5.0])
    cluster.api.failing = rng.choice([0.0, 0.1, 0.9])
    cluster.api.lost = rng.choice([0.0, 0.1, 0.5])
    cluster.engine.after(rng.uniform(5, 120), cluster.restore_api)


def partition(cluster: SimulatedCluster) -> None:
    """Lose a share of the heartbeats for a while."""
    rng = cluster.engine.rng
    cluster.partition_until = cluster.engine.time + rng.choice([20.0, 90.0, 600.0])
    cluster.partition_share = rng.choice([0.1, 0.5, 1.0])


def suspend(cluster: SimulatedCluster) -> None:
    """Suspend a job, and resume it some time later."""
    rng = cluster.engine.rng
    names = list(cluster.server.jobs)
    if names:
        name = rng.choice(names)
        cluster.set_suspend(name, True)
        cluster.engine.after(rng.uniform(1, 600), lambda: cluster.set_suspend(name, False))


def delete_job(cluster: SimulatedCluster) -> None:
    """Delete a job, and create another one with the same spec."""
    names = list(cluster.server.jobs)
    if names:
        cluster.replace_job(cluster.engine.rng.choice(names))


def evict_job(cluster: SimulatedCluster) -> None:
    """Let the queue evict a job."""
    cluster.server.queue.evict_one()


def delete_workload(cluster: SimulatedCluster) -> None:
    """Delete the Workload of a job."""
    cluster.server.queue.delete_one()


def change_queue_quota(cluster: SimulatedCluster) -> None:
    """Shrink the quota of the queue, and restore it later."""
    rng, queue = cluster.engine.rng, cluster.server.queue
    queue.set_quota(rng.randint(0, 8))
    cluster.engine.after(rng.uniform(10, 3600), lambda: queue.set_quota(None))


FAULTS = (
    SimulatedFault(5, preempt),
    SimulatedFault(2, stop_node),
    SimulatedFault(2, remove_node),
    SimulatedFault(2, disconnect_node),
    SimulatedFault(0.5, reclaim_nodes),
    SimulatedFault(0.5, change_capacity),
    SimulatedFault(0.3, set_quota),
    SimulatedFault(0.3, stall_pulls),
    SimulatedFault(0.5, refuse_pods),
    SimulatedFault(0.5, fail_init_container),
    SimulatedFault(0.5, edit_template),
    SimulatedFault(4, fail_program),
    SimulatedFault(2, exceed_memory),
    SimulatedFault(1, break_gpu),
    SimulatedFault(1, break_fabric),
    SimulatedFault(1, hang),
    SimulatedFault(2, evict_pod),
    SimulatedFault(1, restart_operator),
    SimulatedFault(1, break_watch),
    SimulatedFault(1, delay_watch),
    SimulatedFault(1, degrade_api),
    SimulatedFault(1, partition),
    SimulatedFault(0.5, suspend),
    SimulatedFault(0.2, delete_job),
    SimulatedFault(2, evict_job),
    SimulatedFault(0.2, delete_workload),
    SimulatedFault(0.5, change_queue_quota),
)
"""All kinds of faults, with their weights."""


def inject_random_fault(cluster: SimulatedCluster) -> str:
    """Inject one fault, drawn by weight; return its name."""
    weights = [fault.weight for fault in FAULTS]
    fault = cluster.engine.rng.choices(FAULTS, weights)[0]
    fault.inject(cluster)
    return fault.inject.__name__
