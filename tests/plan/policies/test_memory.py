"""More memory for the pods of a job after the kernel has ended one of them, up to recovery.maxMemory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetune_contract.exit_codes import OOM_KILL
from finetune_operator.api.reasons import CountsAs, Reason
from finetune_operator.plan.model.types import DeletePod, PodPhase, ResizePod
from finetune_operator.settings import Settings
from tests.plan.fake_cluster import FakeCluster, last_words, make_job
from tests.plan.scenarios import HOLDING, send_heartbeats, wait_for_peers

TOPOLOGY = {"accelerator": "cpu", "nodes": 3, "resources": {"memory": "8Gi"}}
RESIZING = replace(HOLDING, resize_pods=True)


def trained(settings: Settings = RESIZING, *, most: str | None = "20Gi", **spec: Any) -> FakeCluster:
    """Return a job of three pods that trains at step 10, with a checkpoint of step 5."""
    recovery = {"recovery": {"maxMemory": most} if most else {}}
    cluster = FakeCluster(make_job(topology=TOPOLOGY, **recovery, **spec), settings=settings).running()
    cluster.train_to(10, checkpoint=5)
    cluster.settle()
    return cluster


def kill(cluster: FakeCluster) -> None:
    """Let the kernel end pod 1; the others lose their peer."""
    cluster.exit(1, 137, reason="OOMKilled")
    wait_for_peers(cluster, 0, 2)
    cluster.settle()


def memory_of(cluster: FakeCluster) -> dict[str, str | None]:
    return {name: pod.memory for name, pod in sorted(cluster.pods.items())}


def limits_of(cluster: FakeCluster, name: str) -> dict[str, Any]:
    resources = cluster.manifests[name]["spec"]["containers"][0]["resources"]
    assert resources["requests"]["memory"] == resources["limits"]["memory"]
    return dict(resources["limits"])


def recover(cluster: FakeCluster) -> None:
    """Wait for the back-off while the kept pods send heartbeats, then start the next attempt."""
    attempt = cluster.job.status.attempt
    while cluster.job.status.attempt == attempt:
        cluster.tick(10)
        for pod in cluster.pods.values():
            if pod.exit_code is None:
                cluster.say(pod, pod.node_rank, step=10, waiting=True)
        cluster.settle()
    cluster.run_all()
    cluster.settle()


def test_next_pod_and_survivors_get_half_as_much_again() -> None:
    cluster = trained()
    kill(cluster)
    status = cluster.job.status
    entry = status.attempts[0]
    assert (entry.reason, entry.counts_as, entry.pod) == (Reason.OUT_OF_MEMORY, CountsAs.FAILURE, "circles-a1-n1")
    assert (entry.memory, status.memory) == ("8Gi", "12288Mi")
    (event,) = (event for event in cluster.events if event.reason == Reason.MEMORY_RAISED)
    assert event.message.endswith("the memory of each pod is raised from 8Gi to 12288Mi")
    # The survivors are changed in place.
    assert memory_of(cluster) == {"circles-a1-n0": "12288Mi", "circles-a1-n2": "12288Mi"}
    recover(cluster)
    assert cluster.job.status.attempts[-1].pod_attempts == (1, 2, 1)
    assert limits_of(cluster, "circles-a2-n1")["memory"] == "12288Mi"
    (shm,) = (v for v in cluster.manifests["circles-a2-n1"]["spec"]["volumes"] if v["name"] == "shared-memory")
    assert shm["emptyDir"]["sizeLimit"] == "6144Mi"
    assert cluster.job.status.memory == "12288Mi"


def test_memory_grows_to_its_maximum_without_spending_the_failure_budget() -> None:
    cluster = trained(replace(RESIZING, hold_seconds=0, same_step_failures=2))
    amounts = []
    for _ in range(3):
        kill(cluster)
        amounts.append(cluster.job.status.memory)
        assert cluster.job.status.tally.failures_since_checkpoint == 0
        recover(cluster)
        assert limits_of(cluster, cluster.pod(1).name)["memory"] == amounts[-1]
    assert amounts == ["12288Mi", "18432Mi", "20Gi"]
    assert cluster.job.status.failures == 3
    # With the maximum, an end is an ordinary failure again.
    kill(cluster)
    assert cluster.job.status.memory == "20Gi"
    assert cluster.job.status.attempts[-1].memory is None
    assert cluster.job.status.tally.failures_since_checkpoint == 1
    assert [event.reason for event in cluster.events].count(Reason.MEMORY_RAISED) == 3


def test_kill_of_a_rank_that_the_supervisor_reports_raises_the_memory() -> None:
    cluster = trained()
    report = f"step 10\n{OOM_KILL}, whose memory limit is 8192 MiB"
    cluster.exit(1, 137, termination=last_words(1, 137, report, rank=1))
    wait_for_peers(cluster, 0, 2)
    cluster.settle()
    assert cluster.job.status.memory == "12288Mi"


@pytest.mark.parametrize(
    "output", ["torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "MemoryError"]
)
def test_other_lack_of_memory_does_not_raise_it(output: str) -> None:
    """More memory of the pod is of no help to a GPU, and a failed allocation is no kill."""
    cluster = trained()
    cluster.exit(1, 1, termination=last_words(1, 1, output, rank=1))
    wait_for_peers(cluster, 0, 2)
    cluster.settle()
    assert cluster.job.status.attempts[0].reason == Reason.OUT_OF_MEMORY
    assert (cluster.job.status.memory, cluster.job.status.attempts[0].memory) == (None, None)
    assert cluster.job.status.tally.failures_since_checkpoint == 1


def test_memory_stays_without_a_maximum() -> None:
    cluster = trained(most=None)
    kill(cluster)
    assert cluster.job.status.memory is None
    assert set(memory_of(cluster).values()) == {"8Gi"}


def test_running_pods_are_changed_only_if_the_administrator_allows_it() -> None:
    cluster = trained(HOLDING)
    kill(cluster)
    assert cluster.job.status.memory == "12288Mi"
    assert set(memory_of(cluster).values()) == {"8Gi"}
    recover(cluster)
    assert memory_of(cluster) == {"circles-a1-n0": "8Gi", "circles-a1-n2": "8Gi", "circles-a2-n1": "12288Mi"}


def test_end_of_a_pod_with_less_memory_than_a_new_one_raises_nothing() -> None:
    cluster = trained(HOLDING)
    kill(cluster)
    recover(cluster)
    send_heartbeats(cluster, step=11)
    cluster.settle()
    kept = cluster.pods["circles-a1-n2"]
    cluster.pods[kept.name] = replace(kept, phase=PodPhase.FAILED, exit_code=137, ready=False, reason="OOMKilled")
    cluster.settle()
    cluster.tick(4)
    cluster.settle()
    assert cluster.job.status.attempts[1].reason == Reason.OUT_OF_MEMORY
    assert cluster.job.status.memory == "12288Mi"


def test_memory_that_pod_template_sets_is_not_raised() -> None:
    own = {"spec": {"containers": [{"name": "trainer", "resources": {"limits": {"memory": "6Gi"}}}]}}
    cluster = trained(podTemplate=own)
    kill(cluster)
    assert cluster.job.status.memory is None


def test_pods_that_leave_are_not_changed() -> None:
    cluster = trained(replace(RESIZING, hold_seconds=0))
    cluster.exit(1, 137, reason="OOMKilled")
    actions = [action for _ in range(3) for action in cluster.step().actions]
    assert cluster.job.status.memory == "12288Mi"
    assert not [action for action in actions if isinstance(action, ResizePod)]
    assert {action.name for action in actions if isinstance(action, DeletePod)} > {"circles-a1-n0", "circles-a1-n2"}
