"""The table of causes: for each observed state of a pod, the reason, how it counts, and the rank that is named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetune_contract.cpu.backend import choose_backend
from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import RankEnd, Termination
from finetune_operator.api.reasons import CountsAs, Reason
from finetune_operator.plan import plan
from finetune_operator.plan.model.causes import Cause, find_cause
from finetune_operator.plan.model.types import ObservedNode, PodPhase
from finetune_operator.plan.model.view import View
from tests.plan.fake_cluster import START, FakeCluster, last_words, seconds

PREEMPTION, FAILURE = CountsAs.PREEMPTION, CountsAs.FAILURE
EVICTED_BY_API = Reason.EVICTION_BY_EVICTION_API


def cause_of(cluster: FakeCluster) -> Cause | None:
    return find_cause(View(cluster.job, cluster.observed(), cluster.now, cluster.settings), gang_complete=True)


ONE_POD = [
    ({"disruption": "PreemptionByScheduler"}, Reason.PREEMPTION_BY_SCHEDULER, PREEMPTION),
    ({"disruption": "DeletionByTaintManager"}, Reason.DELETION_BY_TAINT_MANAGER, PREEMPTION),
    ({"disruption": "EvictionByEvictionAPI"}, Reason.EVICTION_BY_EVICTION_API, PREEMPTION),
    ({"disruption": "DeletionByPodGC"}, Reason.DELETION_BY_POD_GC, PREEMPTION),
    ({"disruption": "TerminationByKubelet"}, Reason.TERMINATION_BY_KUBELET, PREEMPTION),
    ({"disruption": "SomethingNew"}, Reason.PREEMPTED, PREEMPTION),
    ({"disruption": "TerminationByKubelet", "exit_code": 137}, Reason.TERMINATION_BY_KUBELET, PREEMPTION),
    ({"disruption": "TerminationByKubelet", "reason": "Evicted"}, Reason.TERMINATION_BY_KUBELET, PREEMPTION),
    ({"reason": "Shutdown"}, Reason.TERMINATION_BY_KUBELET, PREEMPTION),
    ({"reason": "Preempting"}, Reason.TERMINATION_BY_KUBELET, PREEMPTION),
    ({"reason": "NodeLost"}, Reason.NODE_LOST, PREEMPTION),
    ({"deleted_at": START}, Reason.POD_DELETED, PREEMPTION),
    ({"deleted_at": START, "exit_code": 137}, Reason.POD_DELETED, PREEMPTION),
    ({"exit_code": ExitCode.SAVED}, Reason.NOTICE_SAVED, PREEMPTION),
    ({"exit_code": 143}, Reason.PREEMPTED, PREEMPTION),
    ({"exit_code": 137, "reason": "OOMKilled"}, Reason.OUT_OF_MEMORY, FAILURE),
    ({"exit_code": 137}, Reason.PROCESS_FAILED, FAILURE),
    ({"exit_code": 1}, Reason.PROCESS_FAILED, FAILURE),
    ({"exit_code": ExitCode.SOFTWARE}, Reason.PROCESS_FAILED, FAILURE),
    ({"exit_code": ExitCode.CONFIG}, Reason.CONFIGURATION_ERROR, FAILURE),
    ({"exit_code": ExitCode.DATA}, Reason.DATA_ERROR, FAILURE),
    ({"exit_code": ExitCode.STORAGE}, Reason.STORAGE_ERROR, FAILURE),
    ({"exit_code": ExitCode.NETWORK}, Reason.NETWORK_ERROR, CountsAs.OUTAGE),
    ({"exit_code": ExitCode.STORAGE_OUTAGE}, Reason.STORAGE_UNAVAILABLE, CountsAs.OUTAGE),
    ({"exit_code": ExitCode.NETWORK, "disruption": "EvictionByEvictionAPI"}, EVICTED_BY_API, PREEMPTION),
    ({"exit_code": ExitCode.STALE}, Reason.CHECKPOINT_STALE, FAILURE),
    ({"exit_code": ExitCode.FABRIC}, Reason.FABRIC_ERROR, FAILURE),
    ({"exit_code": ExitCode.SUPERSEDED}, Reason.SUPERSEDED, None),
    ({"reason": "Evicted"}, Reason.EVICTED, FAILURE),
    ({"reason": "Evicted", "message": "Pod was rejected: DiskPressure"}, Reason.REFUSED_BY_KUBELET, PREEMPTION),
    ({"reason": "NodeShutdown", "message": "Pod was rejected: shutdown"}, Reason.REFUSED_BY_KUBELET, PREEMPTION),
    ({"reason": "UnexpectedAdmissionError"}, Reason.REFUSED_BY_KUBELET, PREEMPTION),
    ({"reason": "NodeAffinity"}, Reason.REFUSED_BY_KUBELET, PREEMPTION),
    # The kubelet was restarted, and did not admit its own running pod again.
    ({"reason": "NodeAffinity", "exit_code": 137}, Reason.REFUSED_BY_KUBELET, PREEMPTION),
    ({"reason": "TopologyAffinityError"}, Reason.REFUSED_BY_KUBELET, PREEMPTION),
    ({"reason": "OutOfcpu"}, Reason.REFUSED_BY_KUBELET, PREEMPTION),
    ({"reason": "OutOfnvidia.com/gpu"}, Reason.REFUSED_BY_KUBELET, PREEMPTION),
    ({"reason": "AReasonOfANewKubelet"}, Reason.REFUSED_BY_KUBELET, PREEMPTION),
    ({"reason": "NodeShutdown"}, Reason.TERMINATION_BY_KUBELET, PREEMPTION),
    ({"reason": "DeadlineExceeded"}, Reason.PROCESS_FAILED, FAILURE),
    # The node was restarted under a running pod.
    ({"reason": "ContainerStatusUnknown", "exit_code": 137}, Reason.NODE_LOST, PREEMPTION),
    ({"reason": "Unknown", "exit_code": 255}, Reason.NODE_LOST, PREEMPTION),
    ({"reason": "Error", "exit_code": 137, "killed": True}, Reason.OUT_OF_MEMORY, FAILURE),
    ({"reason": "Error", "exit_code": 137}, Reason.PROCESS_FAILED, FAILURE),
    ({"init_failure": "init container x: exit code 1", "reason": "Error"}, Reason.INIT_CONTAINER_FAILED, FAILURE),
]


@pytest.mark.parametrize(("observed", "reason", "counts_as"), ONE_POD)
def test_cause_of_one_pod(observed: dict[str, Any], reason: Reason, counts_as: CountsAs | None) -> None:
    cluster = FakeCluster().running()
    ended = "exit_code" in observed or "reason" in observed
    cluster.change(1, phase=PodPhase.FAILED if ended else PodPhase.RUNNING, **observed)
    cause = cause_of(cluster)
    assert cause is not None
    assert (cause.reason, cause.counts_as) == (reason, counts_as)
    assert (cause.rank, cause.pod, cause.node) == (1, "circles-a1-n1", "node-1")
    assert cause.exit_code == observed.get("exit_code")


@pytest.mark.parametrize("phase", [PodPhase.PENDING, PodPhase.RUNNING, PodPhase.SUCCEEDED, PodPhase.UNKNOWN])
def test_healthy_pods_have_no_cause(phase: PodPhase) -> None:
    cluster = FakeCluster().running()
    cluster.change(0, phase=phase)
    assert cause_of(cluster) is None


def test_done_pod_is_never_a_cause() -> None:
    cluster = FakeCluster().running()
    cluster.change(0, phase=PodPhase.SUCCEEDED, exit_code=0, deleted_at=START, disruption="DeletionByTaintManager")
    assert cause_of(cluster) is None


def test_pod_missing_from_a_complete_gang_is_lost() -> None:
    cluster = FakeCluster().running()
    cluster.vanish("circles-a1-n0")
    cause = cause_of(cluster)
    assert cause is not None
    assert (cause.reason, cause.counts_as, cause.rank) == (Reason.POD_LOST, PREEMPTION, 0)
    assert find_cause(View(cluster.job, cluster.observed(), cluster.now, cluster.settings), gang_complete=False) is None


PAIRS = [
    # (rank 0, rank 1, rank that is named, reason)
    ({"exit_code": ExitCode.FABRIC}, {"exit_code": 1}, 1, Reason.PROCESS_FAILED),
    ({"exit_code": ExitCode.FABRIC}, {"disruption": "DeletionByTaintManager"}, 1, Reason.DELETION_BY_TAINT_MANAGER),
    ({"exit_code": ExitCode.FABRIC}, None, 1, Reason.POD_LOST),
    ({"exit_code": 1}, None, 1, Reason.POD_LOST),
    ({"exit_code": ExitCode.SAVED}, {"disruption": "EvictionByEvictionAPI"}, 1, Reason.EVICTION_BY_EVICTION_API),
    ({"exit_code": ExitCode.SAVED}, {"exit_code": 1}, 1, Reason.PROCESS_FAILED),
    ({"exit_code": ExitCode.SAVED}, {"exit_code": ExitCode.FABRIC}, 0, Reason.NOTICE_SAVED),
    ({"disruption": "TerminationByKubelet"}, {"exit_code": 1}, 0, Reason.TERMINATION_BY_KUBELET),
    ({"disruption": "TerminationByKubelet"}, {"exit_code": ExitCode.DATA}, 1, Reason.DATA_ERROR),
    ({"exit_code": ExitCode.FABRIC}, {"exit_code": ExitCode.FABRIC}, 0, Reason.FABRIC_ERROR),
    ({"exit_code": 1}, {"exit_code": 1}, 0, Reason.PROCESS_FAILED),
]


@pytest.mark.parametrize(("first", "second", "rank", "reason"), PAIRS)
def test_cause_among_two_pods(first: dict[str, Any], second: dict[str, Any] | None, rank: int, reason: Reason) -> None:
    cluster = FakeCluster().running()
    for node_rank, observed in enumerate((first, second)):
        if observed is None:
            cluster.vanish(cluster.pod(node_rank).name)
        else:
            cluster.change(
                node_rank, phase=PodPhase.FAILED if "exit_code" in observed else PodPhase.RUNNING, **observed
            )
    cause = cause_of(cluster)
    assert cause is not None
    assert (cause.rank, cause.reason) == (rank, reason)


def test_earlier_of_two_failures_is_the_cause() -> None:
    cluster = FakeCluster().running()
    cluster.exit(0, 1)
    cluster.exit(1, 1)
    cluster.change(1, finished_at=cluster.now - seconds(1))
    cause = cause_of(cluster)
    assert cause is not None
    assert cause.rank == 1


def test_last_output_and_rank_come_from_the_termination_message() -> None:
    cluster = FakeCluster().running()
    cluster.exit(1, 1, termination=last_words(1, 1, "RuntimeError: bad", rank=7))
    cause = cause_of(cluster)
    assert cause is not None
    assert (cause.rank, cause.message) == (7, "RuntimeError: bad")


@pytest.mark.parametrize(
    "output",
    [
        "torch.OutOfMemoryError: CUDA out of memory.",
        "MemoryError",
        "RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory",
        "OSError: [Errno 12] Cannot allocate memory",
    ],
)
def test_out_of_memory_is_recognized_by_its_output(output: str) -> None:
    cluster = FakeCluster().running()
    cluster.exit(1, ExitCode.SOFTWARE, termination=last_words(1, ExitCode.SOFTWARE, output))
    cause = cause_of(cluster)
    assert cause is not None
    assert cause.reason is Reason.OUT_OF_MEMORY


def test_heartbeat_reports_an_end_before_the_pod() -> None:
    cluster = FakeCluster().running()
    cluster.beat(1, step=3, ends=(RankEnd(rank=1, exit_code=1, last_words="ValueError"),))
    cause = cause_of(cluster)
    assert cause is not None
    assert (cause.reason, cause.exit_code, cause.message) == (Reason.PROCESS_FAILED, 1, "ValueError")


def test_heartbeat_reports_a_notice_before_the_pod() -> None:
    cluster = FakeCluster().running()
    cluster.beat(1, step=3, notice=True)
    cause = cause_of(cluster)
    assert cause is not None
    assert (cause.reason, cause.consequence) == (Reason.PREEMPTED, True)


def test_pods_of_an_older_attempt_are_no_cause() -> None:
    cluster = FakeCluster().running()
    old = replace(cluster.pod(0), name="circles-a0-n0", uid="old", attempt=0, phase=PodPhase.FAILED, exit_code=1)
    cluster.pods[old.name] = old
    assert cause_of(cluster) is None


@pytest.mark.parametrize(
    ("node", "notice", "reason"),
    [
        (None, False, Reason.POD_LOST),
        (None, True, Reason.PREEMPTED),
        (ObservedNode(leaving="aws-node-termination-handler/spot-itn"), False, Reason.PREEMPTED),
        (ObservedNode(lost=True, gone=True), False, Reason.NODE_LOST),
    ],
    ids=["healthy node", "notice", "leaving node", "deleted node"],
)
def test_cause_of_a_pod_deleted_before_its_termination_message_was_read(
    node: ObservedNode | None, notice: bool, reason: Reason
) -> None:
    """Its last heartbeat, or the state of its node, gives a more specific reason than PodLost."""
    cluster = FakeCluster().running()
    cluster.train_to(5)
    cluster.settle()
    cluster.beat(1, step=5, restored_step=0, notice=notice)
    # Its last heartbeat is still known.
    del cluster.pods[cluster.pod(1).name]
    observed = replace(cluster.observed(), nodes={"node-1": node} if node else {})
    entry = plan(cluster.job, observed, cluster.now, cluster.settings).status.attempts[0]
    assert (entry.reason, entry.counts_as, entry.node) == (reason, CountsAs.PREEMPTION, "node-1")


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", Reason.OUT_OF_MEMORY),
        ("[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5)", Reason.FABRIC_ERROR),
        ("torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp", Reason.FABRIC_ERROR),
        ("RuntimeError: [../gloo/transport/tcp/pair.cc:534] Connection closed by peer", Reason.FABRIC_ERROR),
        ("ConnectionResetError: [Errno 104] Connection reset by peer", Reason.FABRIC_ERROR),
        ("oneCCL: |CCL_ERROR| worker thread failed", Reason.FABRIC_ERROR),
        ("oneCCL: ze_fd_manager.cpp:144 init_device_fds: EXCEPTION: opendir failed", Reason.FABRIC_ERROR),
        ("KeyError: 'nclc'", Reason.PROCESS_FAILED),
        # What every pod prints at its start.
        (f"backend gloo: {choose_backend('auto', lambda _: False).reason}", Reason.PROCESS_FAILED),
        (f"backend ccl: {choose_backend('auto', lambda _: True).reason}", Reason.PROCESS_FAILED),
    ],
)
def test_cause_is_recognized_by_the_output_of_a_script(output: str, reason: Reason) -> None:
    """A script does not use the exit codes of the contract."""
    cluster = FakeCluster().running()
    ends = (RankEnd(rank=1, exit_code=1, last_words=output),)
    cluster.exit(1, 1, termination=Termination(attempt=1, exit_code=1, ends=ends))
    cause = cause_of(cluster)
    assert cause is not None
    assert (cause.reason, cause.consequence) == (reason, reason is Reason.FABRIC_ERROR)
