"""Faulty GPUs: the ledger names node, GPU and XID, no budget is spent, and the next attempt avoids the node."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetune_contract.environment import CHECK_DEVICES
from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import GpuFault, Heartbeat, Order, RankEnd, RankState, Termination
from finetune_operator.plan.model.backoff import next_attempt_at
from finetune_operator.plan.model.types import ObservedNode, PodPhase
from finetune_trainer.supervisor.xid import FAULTS, describe_fault
from tests.plan.fake_cluster import SETTINGS, FakeCluster, make_job
from tests.plan.scenarios import HOLDING, wait_for_peers

GPUS = {"accelerator": "gpu", "nodes": 2}
UUID = "GPU-1f0c"
FALLEN = GpuFault(uuid=UUID, xid=79, message=describe_fault(UUID, 79))
XID_TAINT = "nvidia.com/gpu-xid-error"
REPORTED = ObservedNode(leaving=XID_TAINT, gpu_fault=f"{XID_TAINT}, reported by NVSentinel")


def trained(settings: Any = SETTINGS, accelerator: str = "gpu") -> FakeCluster:
    """Return a job on two nodes that trains at step 10."""
    cluster = FakeCluster(make_job(topology={**GPUS, "accelerator": accelerator}), settings=settings).running()
    for rank in range(2):
        cluster.change(rank, node=f"node-{rank}")
    cluster.train_to(10, checkpoint=5)
    cluster.settle()
    return cluster


def fail(cluster: FakeCluster, rank: int, code: int = ExitCode.SOFTWARE, *faults: GpuFault) -> None:
    """Let the rank of a pod end."""
    end = RankEnd(rank=rank, exit_code=code, last_words="CUDA error: unspecified launch failure")
    cluster.beat(rank, RankState.FAILED, step=10, restored_step=0, ends=(end,), gpu_faults=faults)
    termination = Termination(attempt=1, exit_code=code, ends=(end,), gpu_faults=faults)
    cluster.exit(rank, code, termination=termination)
    cluster.settle()


def test_fault_that_the_driver_reports_is_in_the_ledger() -> None:
    cluster = trained()
    fail(cluster, 1, ExitCode.SOFTWARE, FALLEN)
    entry = cluster.job.status.attempts[0]
    assert (entry.reason, entry.counts_as, entry.node) == ("GpuFault", "Preemption", "node-1")
    assert (entry.gpu, entry.xid, entry.rank, entry.exit_code) == (UUID, 79, 1, ExitCode.SOFTWARE)
    assert entry.message == (
        "GPU GPU-1f0c: XID 79, the GPU has fallen off the bus: CUDA error: unspecified launch failure"
    )
    assert (cluster.job.status.failures, cluster.job.status.preemptions) == (0, 1)


def test_fault_precedes_what_the_peers_and_the_cluster_report() -> None:
    cluster = trained()
    fail(cluster, 0, ExitCode.FABRIC)
    assert cluster.job.status.attempts[0].reason is None
    fail(cluster, 1, ExitCode.SOFTWARE, FALLEN)
    assert cluster.job.status.attempts[0].reason == "GpuFault"


@pytest.mark.parametrize("code", [None, ExitCode.DONE])
def test_fault_without_a_failed_rank_is_no_end(code: int | None) -> None:
    """The driver may report a GPU of another pod, and ranks that work go on."""
    cluster = trained()
    ends = () if code is None else (RankEnd(rank=1, exit_code=code),)
    cluster.beat(1, step=11, gpu_faults=(FALLEN,), ends=ends)
    cluster.settle()
    assert cluster.job.status.attempts[0].ended_at is None


def test_next_attempt_avoids_the_node_and_checks_all_devices() -> None:
    cluster = trained()
    fail(cluster, 1, ExitCode.SOFTWARE, FALLEN)
    cluster.tick(60)
    cluster.settle()
    assert cluster.job.status.attempt == 2
    for rank in range(2):
        pod = cluster.manifests[f"circles-a2-n{rank}"]
        affinity = pod["spec"]["affinity"]["nodeAffinity"]
        terms = affinity["preferredDuringSchedulingIgnoredDuringExecution"]
        assert [term["preference"]["matchFields"][0]["values"] for term in terms] == [["node-1"]]
        env = {each["name"]: each.get("value") for each in pod["spec"]["containers"][0]["env"]}
        assert env[CHECK_DEVICES] == "1"


def test_kept_pods_check_their_devices_and_the_faulty_pod_is_replaced() -> None:
    cluster = trained(HOLDING)
    end = RankEnd(rank=1, exit_code=ExitCode.SAVED)
    cluster.beat(1, RankState.SAVED, step=10, restored_step=0, ends=(end,), waiting=True, gpu_faults=(FALLEN,))
    wait_for_peers(cluster, 0)
    cluster.settle()
    cluster.tick(5)
    wait_for_peers(cluster, 0)
    cluster.settle()
    status = cluster.job.status
    assert [entry.reason for entry in status.attempts] == ["GpuFault", None]
    assert status.attempts[1].pod_attempts == (1, 2)
    cluster.change(1, phase=PodPhase.RUNNING, node="node-2", ready=True)
    cluster.settle()
    world = cluster.reply(kept_beat(cluster)).world
    assert world is not None
    assert world.check_devices


def kept_beat(cluster: FakeCluster) -> Heartbeat:
    """Return the newest heartbeat of the pod that was kept."""
    return next(received.beat for received in cluster.beats.values() if received.beat.node_rank == 0)


def test_repeated_faults_delay_the_next_attempt() -> None:
    """A job whose only node is faulty must not restart in a tight loop: its budget does not end it."""
    cluster = trained()
    status = cluster.job.status
    entry = status.attempts[0].model_copy(
        update={"reason": "GpuFault", "counts_as": "Preemption", "ended_at": cluster.now}
    )
    delays = []
    for number in (1, 2, 3):
        many = status.model_copy(update={"attempts": (entry,) * number})
        at = next_attempt_at(entry, many, SETTINGS, "uid")
        delays.append(0.0 if at is None else (at - cluster.now).total_seconds())
    assert delays[0] == 0
    assert 0 < delays[1] < delays[2]


def test_node_that_a_health_tool_reports_is_left_with_a_save() -> None:
    cluster = trained(HOLDING)
    cluster.nodes["node-1"] = REPORTED
    cluster.settle()
    entry = cluster.job.status.attempts[0]
    assert (entry.reason, entry.counts_as, entry.node, entry.gpu, entry.xid) == (
        "GpuFault",
        "Preemption",
        "node-1",
        None,
        None,
    )
    assert entry.message is not None
    assert entry.message.startswith("nvidia.com/gpu-xid-error, reported by NVSentinel")
    assert cluster.reply(kept_beat(cluster)).order is Order.SAVE_AND_STOP


def test_condition_alone_explains_a_failure_and_moves_no_pod() -> None:
    cluster = trained()
    cluster.nodes["node-1"] = replace(REPORTED, leaving="")
    cluster.settle()
    assert cluster.job.status.attempts[0].ended_at is None
    fail(cluster, 1)
    assert cluster.job.status.attempts[0].reason == "GpuFault"


@pytest.mark.parametrize("code", [ExitCode.STORAGE, ExitCode.NETWORK, ExitCode.CONFIG])
def test_condition_does_not_explain_an_end_that_explains_itself(code: ExitCode) -> None:
    cluster = trained()
    cluster.nodes["node-1"] = replace(REPORTED, leaving="")
    fail(cluster, 1, code)
    assert cluster.job.status.attempts[0].reason not in {None, "GpuFault"}


def test_cpu_jobs_have_no_faulty_gpus() -> None:
    cluster = trained(accelerator="cpu")
    cluster.nodes["node-1"] = REPORTED
    cluster.settle()
    assert cluster.job.status.attempts[0].reason == "Preempted"


def test_tainted_device_of_a_pod() -> None:
    """DRA: the API server's controller deletes pods whose devices have a taint."""
    cluster = trained()
    cluster.change(
        1, disruption="DeletionByDeviceTaintManager", message="Device Taint manager: deleting due to NoExecute"
    )
    cluster.settle()
    entry = cluster.job.status.attempts[0]
    assert (entry.reason, entry.node) == ("GpuFault", "node-1")
    assert "NoExecute" in (entry.message or "")


def test_device_that_computes_wrong_results() -> None:
    cluster = trained()
    fail(cluster, 0, ExitCode.DEVICE)
    entry = cluster.job.status.attempts[0]
    assert (entry.reason, entry.node, cluster.job.status.failures) == ("GpuFault", "node-0", 0)


def test_errors_that_programs_can_cause_are_no_faults() -> None:
    """NVIDIA's device plugin ignores the same ones."""
    assert not {13, 31, 43, 45, 68, 109} & FAULTS.keys()
    assert describe_fault(UUID, None) == "GPU GPU-1f0c: uncorrectable ECC errors"
    assert describe_fault(UUID, 1) == "GPU GPU-1f0c: XID 1, an error of the GPU"
