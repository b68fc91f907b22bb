"""Phase, reason and message for every state of a job."""

from __future__ import annotations

from dataclasses import replace

import pytest

from finetune_contract.exit_codes import ExitCode
from finetune_contract.phase import Phase
from finetune_operator.api.reasons import Reason
from finetune_operator.plan.model.types import PodPhase
from finetune_operator.settings import Settings
from tests.plan.fake_cluster import SETTINGS, FakeCluster, RankState, make_job, seconds
from tests.plan.scenarios import fixed_cluster, wait_for_peers


def line(cluster: FakeCluster) -> tuple[Phase | None, str | None, str]:
    cluster.settle()
    status = cluster.job.status
    return status.phase, status.reason, status.message or ""


def test_starting_pods() -> None:
    cluster = FakeCluster()
    assert line(cluster) == (Phase.STARTING, Reason.WAITING_FOR_PODS, "0/2 pods are running")
    cluster.run_all()
    phase, reason, message = line(cluster)
    assert (phase, reason) == (Phase.STARTING, Reason.LOADING)
    assert "waiting for the first heartbeat" in message


@pytest.mark.parametrize(
    ("waiting", "phase", "reason"),
    [
        ("Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu.", Phase.QUEUED, Reason.UNSCHEDULABLE),
        ("SchedulingGated: Scheduling is blocked due to non-empty scheduling gates", Phase.QUEUED, Reason.QUEUED),
        ("ImagePullBackOff: Back-off pulling image", Phase.STARTING, Reason.IMAGE_PULL),
        ("ErrImagePull: not found", Phase.STARTING, Reason.IMAGE_PULL),
        ("CreateContainerConfigError: secret 'hub' not found", Phase.STARTING, Reason.CONTAINER_CONFIG),
        ("ContainerCreating", Phase.STARTING, Reason.WAITING_FOR_PODS),
    ],
)
def test_waiting_pod_shows_the_message_of_the_cluster(waiting: str, phase: Phase, reason: Reason) -> None:
    cluster = FakeCluster()
    cluster.settle()
    cluster.change(1, waiting=waiting)
    assert line(cluster) == (phase, reason, f"circles-a1-n1: {waiting}")


WORK = [
    ((RankState.STARTING, RankState.TRAINING), Phase.STARTING, Reason.LOADING),
    ((RankState.LOADING, RankState.CACHING), Phase.STARTING, Reason.LOADING),
    ((RankState.CACHING, RankState.CACHING), Phase.STARTING, Reason.CACHING),
    ((RankState.RESTORING, RankState.TRAINING), Phase.STARTING, Reason.RESTORING),
    ((RankState.TRAINING, RankState.TRAINING), Phase.STARTING, Reason.TRAINING),
    ((RankState.SAVING, RankState.TRAINING), Phase.STARTING, Reason.SAVING),
    ((RankState.VALIDATING, RankState.TRAINING), Phase.STARTING, Reason.VALIDATING),
    ((RankState.EXPORTING, RankState.DONE), Phase.EXPORTING, Reason.EXPORTING),
    ((RankState.EXPORTING, RankState.TRAINING), Phase.EXPORTING, Reason.EXPORTING),
]


@pytest.mark.parametrize(("states", "phase", "reason"), WORK)
def test_activity_of_the_ranks(states: tuple[RankState, RankState], phase: Phase, reason: Reason) -> None:
    cluster = FakeCluster().running()
    for node_rank, state in enumerate(states):
        cluster.beat(node_rank, state)
    assert line(cluster)[:2] == (phase, reason)


def test_running_from_the_first_step() -> None:
    cluster = FakeCluster().running()
    cluster.train_to(0)
    assert line(cluster)[0] is Phase.STARTING
    cluster.train_to(1)
    assert line(cluster) == (Phase.RUNNING, Reason.TRAINING, "training: step 1 of 100")


@pytest.mark.parametrize("heard", [(), (0,)], ids=["no pod", "one pod"])
def test_pod_that_never_sends_a_heartbeat_is_silent_after_a_minute(heard: tuple[int, ...]) -> None:
    cluster = FakeCluster().running()
    for rank in heard:
        cluster.beat(rank, RankState.LOADING)
    assert cluster.settle().requeue_after == seconds(60)
    cluster.tick(59)
    for rank in heard:
        cluster.beat(rank, RankState.LOADING)
    assert line(cluster)[1] == Reason.LOADING
    cluster.tick(1)
    phase, reason, message = line(cluster)
    silent = cluster.pod(len(heard)).name
    assert (phase, reason) == (Phase.STARTING, Reason.SILENT)
    assert message == f"{silent} has sent no heartbeat since 12:00:00 UTC"
    cluster.train_to(1)
    assert line(cluster)[:2] == (Phase.RUNNING, Reason.TRAINING)


def test_operator_that_has_just_started_waits_for_heartbeats() -> None:
    """Its memory is empty, but the pods have sent heartbeats to the process before it."""
    cluster = FakeCluster().running()
    cluster.train_to(10)
    cluster.settle()
    cluster.beats.clear()
    cluster.tick(3600)
    cluster.listening_since = cluster.now
    assert line(cluster) == (Phase.RUNNING, Reason.TRAINING, "training: step 10 of 100")
    cluster.tick(60)
    assert line(cluster) == (Phase.RUNNING, Reason.SILENT, "circles-a1-n0 has sent no heartbeat since 13:00:00 UTC")


def test_kept_pod_that_does_not_join_is_silent() -> None:
    cluster = fixed_cluster(2)
    cluster.vanish("circles-a1-n1")
    wait_for_peers(cluster, 0)
    cluster.settle()
    cluster.run_all()
    cluster.beat(1, RankState.LOADING)
    cluster.settle()
    cluster.tick(60)
    cluster.beat(1, RankState.LOADING)
    assert line(cluster)[1:] == (Reason.SILENT, "circles-a1-n0 has sent no heartbeat since 12:00:00 UTC")


def test_done_pod_is_not_silent_while_its_peer_writes_the_outputs() -> None:
    cluster = FakeCluster().running()
    cluster.beat(0, RankState.DONE, step=100)
    cluster.exit(0, 0)
    cluster.tick(100)
    cluster.beat(1, RankState.EXPORTING, step=100)
    assert line(cluster)[1] == Reason.EXPORTING


def test_no_pod_is_silent_without_a_coordinator() -> None:
    cluster = FakeCluster(settings=replace(SETTINGS, coordinator_url="")).running()
    cluster.tick(1000)
    assert line(cluster)[1] == Reason.TRAINING


def test_message_contains_the_details_of_a_rank() -> None:
    cluster = FakeCluster().running()
    cluster.beat_all(RankState.CACHING, detail="12/64 images")
    assert line(cluster) == (Phase.STARTING, Reason.CACHING, "caching latents and text embeddings: 12/64 images")


def test_recovering_until_the_next_attempts_first_step() -> None:
    cluster = FakeCluster().running()
    cluster.train_to(10)
    cluster.settle()
    cluster.vanish("circles-a1-n1")
    cluster.step()
    phase, reason, message = line(cluster)
    assert (phase, reason) == (Phase.RECOVERING, Reason.POD_LOST)
    assert "rank 1 (circles-a1-n1 on node-1)" in message
    cluster.tick(2)
    assert line(cluster)[0] is Phase.RECOVERING
    cluster.run_all()
    assert line(cluster)[0] is Phase.RECOVERING
    cluster.train_to(5, from_step=5)
    assert line(cluster)[0] is Phase.RECOVERING
    cluster.train_to(6, from_step=5)
    assert line(cluster)[0] is Phase.RUNNING


def test_resumed_job_is_starting_and_not_recovering() -> None:
    cluster = FakeCluster().running()
    cluster.train_to(10)
    cluster.settle()
    for value in (True, False):
        spec = cluster.job.spec.model_copy(update={"suspend": value})
        cluster.job = cluster.job.model_copy(update={"spec": spec})
        cluster.step()
    assert line(cluster)[:2] == (Phase.STARTING, Reason.SUSPENDED)
    cluster.pods.clear()
    assert line(cluster)[0] is Phase.STARTING


def test_pod_silent_while_loading() -> None:
    cluster = FakeCluster().running()
    cluster.beat_all(RankState.LOADING)
    requeue_after = cluster.settle().requeue_after
    assert requeue_after is not None
    cluster.tick(requeue_after.total_seconds())
    assert line(cluster)[:2] == (Phase.STARTING, Reason.SILENT)


def test_restarted_operator_without_heartbeats_keeps_the_status() -> None:
    for state in (RankState.TRAINING, RankState.EXPORTING):
        cluster = FakeCluster().running()
        cluster.train_to(10)
        cluster.settle()
        cluster.beat_all(state, step=10)
        before = line(cluster)
        cluster.beats.clear()
        assert line(cluster) == before


def test_running_pods_without_a_coordinator() -> None:
    cluster = FakeCluster(settings=Settings(require_storage=False)).running()
    assert line(cluster)[:2] == (Phase.RUNNING, Reason.TRAINING)


def test_silent_pod_is_named_with_the_time_of_its_last_heartbeat() -> None:
    cluster = FakeCluster().running()
    cluster.train_to(10)
    requeue_after = cluster.settle().requeue_after
    assert requeue_after is not None
    assert requeue_after.total_seconds() == cluster.settings.beat_timeout_seconds
    cluster.tick(30)
    cluster.beat(0, step=11)
    cluster.tick(30)
    assert line(cluster) == (Phase.RUNNING, Reason.SILENT, "circles-a1-n1 has sent no heartbeat since 12:00:00 UTC")
    cluster.beat(1, step=11)
    assert line(cluster)[:2] == (Phase.RUNNING, Reason.TRAINING)


def test_cause_that_is_not_certain_yet() -> None:
    cluster = FakeCluster().running()
    cluster.exit(0, ExitCode.FABRIC)
    phase, _, message = line(cluster)
    assert (phase, message) == (Phase.RECOVERING, "attempt 1 ended; determining the cause")


def test_finished_job_keeps_its_message() -> None:
    cluster = FakeCluster().running()
    cluster.train_to(100)
    for rank in (0, 1):
        cluster.exit(rank, 0)
    before = line(cluster)
    assert before == (Phase.SUCCEEDED, Reason.FINISHED, "100 steps trained")
    cluster.pods.clear()
    cluster.beats.clear()
    assert line(cluster) == before


def test_refused_job_shows_the_reason() -> None:
    cluster = FakeCluster(make_job(queueName="gpus"))
    phase, reason, message = line(cluster)
    assert (phase, reason) == (Phase.PENDING, Reason.NOT_SUPPORTED)
    assert "queueName" in message


def test_pods_in_phase_unknown_are_not_up() -> None:
    cluster = FakeCluster().running()
    cluster.change(0, phase=PodPhase.UNKNOWN)
    assert line(cluster)[:2] == (Phase.STARTING, Reason.WAITING_FOR_PODS)
