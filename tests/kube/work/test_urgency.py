from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from finetune_contract.heartbeat import CommittedCheckpoint, GpuFault, Heartbeat, RankEnd, RankReport, RankState
from finetune_contract.phase import Phase
from finetune_operator.api.status import AttemptSeconds, AttemptStatus, FineTuneJobStatus
from finetune_operator.cluster.kube.client.objects import KubeJob, KubePod
from finetune_operator.cluster.kube.work.urgency import (
    GangReadiness,
    Urgency,
    attempt_has_ended,
    classify_heartbeat,
    classify_job_change,
    classify_pod_change,
    is_progress,
    measure_gang,
    moves_the_meeting,
)
from finetune_operator.cluster.protocol import JobKey
from finetune_operator.plan.model.types import ObservedPod, PodPhase
from tests.plan.fake_cluster import make_job

NOW = datetime(2026, 1, 1, tzinfo=UTC)
POD = ObservedPod("job-a1-n0", "uid", 1, 0, PodPhase.RUNNING, NOW, node="node-1", ready=True)
PENDING = replace(POD, phase=PodPhase.PENDING, node=None, ready=False)
STARTING = GangReadiness(size=4, num_pods=2, num_ready=1, num_leaving=0, ended=False)
COMPLETE = GangReadiness(size=4, num_pods=4, num_ready=4, num_leaving=0, ended=False)
CLEARING = GangReadiness(size=4, num_pods=2, num_ready=2, num_leaving=2, ended=True)
KEPT = GangReadiness(size=4, num_pods=3, num_ready=3, num_leaving=0, ended=True)
"""The pods that the next attempt keeps, after the lost one has been removed."""


def cached_pod(pod: ObservedPod | None) -> KubePod | None:
    return None if pod is None else KubePod(JobKey("ns", "job"), "owner", pod)


@pytest.mark.parametrize(
    ("old", "new", "gang", "urgency"),
    [
        (None, PENDING, STARTING, Urgency.PROGRESS),
        (None, PENDING, replace(COMPLETE, num_ready=0), Urgency.PROGRESS),
        (None, PENDING, replace(COMPLETE, num_ready=3), Urgency.PROGRESS),
        # The gates of a gang are removed when its last pod exists.
        (None, replace(PENDING, gated=True), replace(COMPLETE, num_ready=0), Urgency.NOW),
        (None, replace(PENDING, gated=True), STARTING, Urgency.PROGRESS),
        (PENDING, PENDING, STARTING, Urgency.NEVER),
        (PENDING, POD, STARTING, Urgency.PROGRESS),
        (PENDING, POD, COMPLETE, Urgency.SOON),
        (POD, replace(POD, deleted_at=NOW), COMPLETE, Urgency.NOW),
        (POD, replace(POD, disruption="EvictionByEvictionAPI"), COMPLETE, Urgency.NOW),
        (POD, replace(POD, phase=PodPhase.FAILED, exit_code=1), STARTING, Urgency.NOW),
        (None, replace(POD, phase=PodPhase.FAILED), STARTING, Urgency.NOW),
        (POD, None, STARTING, Urgency.NOW),
        (POD, replace(POD, deleted_at=NOW), CLEARING, Urgency.PROGRESS),
        (POD, replace(POD, phase=PodPhase.FAILED), CLEARING, Urgency.NOW),
        (POD, None, CLEARING, Urgency.PROGRESS),
        (POD, None, replace(CLEARING, num_pods=0, num_leaving=0), Urgency.NOW),
        # The next attempt has waited for it.
        (POD, None, KEPT, Urgency.NOW),
        (POD, None, replace(KEPT, num_leaving=1), Urgency.PROGRESS),
    ],
)
def test_urgency_of_pod_changes(
    old: ObservedPod | None, new: ObservedPod | None, gang: GangReadiness, urgency: Urgency
) -> None:
    assert classify_pod_change(cached_pod(old), cached_pod(new), gang) is urgency


def test_readiness_of_a_gang_that_ends() -> None:
    ended = AttemptStatus(attempt=1, started_at=NOW, ended_at=NOW, reason="PodDeleted")
    job = make_job(topology={"accelerator": "cpu", "nodes": 3})
    job = job.model_copy(update={"status": FineTuneJobStatus(attempt=1, attempts=(ended,))})
    pods = [replace(POD, name=f"circles-a1-n{rank}", node_rank=rank) for rank in range(3)]
    leaving = [pods[0], pods[1], replace(pods[2], deleted_at=NOW)]
    assert measure_gang(job, pods[2], leaving) == GangReadiness(3, 3, 3, num_leaving=1, ended=True)
    assert measure_gang(job, pods[2], pods[:2]) == GangReadiness(3, 2, 2, num_leaving=0, ended=True)


def cached_job(generation: int = 1, uid: str = "owner", **status: Any) -> KubeJob:
    job = make_job()
    meta = job.metadata.model_copy(update={"generation": generation, "uid": uid})
    job = job.model_copy(update={"metadata": meta, "status": FineTuneJobStatus(**status)})
    return KubeJob(JobKey("ns", "job"), uid, "1", job)


FIRST = AttemptStatus(attempt=1, started_at=NOW)
RUNNING: dict[str, Any] = {"attempt": 1, "attempts": (FIRST,), "phase": Phase.RUNNING, "step": 1}


@pytest.mark.parametrize(
    ("old", "new", "urgency"),
    [
        (None, cached_job(), Urgency.NOW),
        (cached_job(), None, Urgency.NOW),
        (cached_job(), cached_job(generation=2), Urgency.NOW),
        (cached_job(), cached_job(uid="another"), Urgency.NOW),
        (cached_job(), cached_job(**RUNNING), Urgency.NOW),
        (
            cached_job(**RUNNING),
            cached_job(**RUNNING | {"attempts": (FIRST.model_copy(update={"ended_at": NOW}),)}),
            Urgency.NOW,
        ),
        (cached_job(**RUNNING), cached_job(**RUNNING | {"phase": Phase.EXPORTING}), Urgency.SOON),
        (cached_job(**RUNNING), cached_job(**RUNNING | {"step": 2, "loss": 0.1}), Urgency.PROGRESS),
    ],
)
def test_urgency_of_job_changes(old: KubeJob | None, new: KubeJob | None, urgency: Urgency) -> None:
    assert classify_job_change(old, new) is urgency


def beat(state: RankState = RankState.TRAINING, step: int = 1, **more: Any) -> Heartbeat:
    given: dict[str, Any] = {
        "job": "job",
        "namespace": "ns",
        "job_uid": "owner",
        "pod": "job-a1-n0",
        "pod_uid": "uid",
        "attempt": 1,
        "node_rank": 0,
        "sequence": 1,
        "ranks": (RankReport(rank=0, state=state, step=step),),
    }
    return Heartbeat(**given | more)


FIRST_CHECKPOINT = (
    RankReport(
        rank=0,
        state=RankState.TRAINING,
        step=1,
        checkpoint=CommittedCheckpoint(step=1, time=0.0, size_bytes=1, attempt=1),
    ),
)
ENDS = (RankEnd(rank=0, exit_code=1),)


@pytest.mark.parametrize(
    ("old", "new", "urgency"),
    [
        (None, beat(), Urgency.SOON),
        (None, beat(RankState.FAILED), Urgency.NOW),
        (beat(), beat(sequence=2), Urgency.NEVER),
        (beat(), beat(step=2), Urgency.PROGRESS),
        (beat(RankState.LOADING), beat(), Urgency.SOON),
        (beat(), beat(ranks=FIRST_CHECKPOINT), Urgency.SOON),
        (beat(), beat(RankState.DONE), Urgency.NOW),
        (beat(), beat(notice=True), Urgency.NOW),
        (beat(), beat(ends=ENDS), Urgency.NOW),
        (beat(notice=True), beat(notice=True, step=2), Urgency.PROGRESS),
        # The next attempt waits for the last pod that is kept.
        (beat(RankState.FAILED, ends=ENDS), beat(RankState.FAILED, ends=ENDS, waiting=True), Urgency.NOW),
        (beat(RankState.FAILED, ends=ENDS, waiting=True), beat(RankState.STARTING, attempt=2), Urgency.SOON),
        (beat(), beat(gpu_faults=(GpuFault(uuid="GPU-1", xid=79),)), Urgency.NOW),
    ],
)
def test_urgency_of_heartbeats(old: Heartbeat | None, new: Heartbeat, urgency: Urgency) -> None:
    assert classify_heartbeat(old, new) is urgency


STATUS = FineTuneJobStatus(phase=Phase.RUNNING, attempt=1, attempts=(AttemptStatus(attempt=1, started_at=NOW),))
ENTRY = STATUS.attempts[0]
PLACED = ENTRY.model_copy(
    update={"gang_complete": True, "pod_nodes": ("node-1",), "seconds": AttemptSeconds(queueing=3.0)}
)
"""Its pods exist and have nodes, but do not all run yet."""


@pytest.mark.parametrize(
    ("changes", "progress"),
    [
        ({}, True),
        ({"step": 3, "eta": "4m", "loss": 0.1, "writes": 9}, True),
        ({"attempts": (ENTRY.model_copy(update={"to_step": 3, "progress_at": NOW}),)}, True),
        ({"attempts": (PLACED,)}, True),
        ({"attempts": (PLACED.model_copy(update={"seconds": AttemptSeconds(queueing=3.0, pulling=2.0)}),)}, False),
        ({"attempts": (PLACED.model_copy(update={"ended_at": NOW}),)}, False),
        ({"step": 3, "phase": Phase.EXPORTING}, False),
        ({"attempt": 2}, False),
    ],
)
def test_status_changes_that_are_only_progress(changes: dict[str, Any], progress: bool) -> None:
    assert is_progress(STATUS, STATUS.model_copy(update=changes)) is progress


def test_attempt_has_ended_with_its_cause_or_with_the_next_attempt() -> None:
    assert not attempt_has_ended(STATUS, 1)
    assert attempt_has_ended(STATUS, 0)
    entry = ENTRY.model_copy(update={"reason": "PodLost"})
    assert attempt_has_ended(STATUS.model_copy(update={"attempts": (entry,)}), 1)


ADDRESSED = replace(POD, address="10.0.0.1")


@pytest.mark.parametrize(
    ("old", "new", "moves"),
    [
        (None, ADDRESSED, True),
        (replace(ADDRESSED, phase=PodPhase.PENDING), ADDRESSED, True),
        (ADDRESSED, replace(ADDRESSED, address="10.0.0.2"), True),
        (ADDRESSED, replace(ADDRESSED, ready=False), False),
        # Its address may change until it runs.
        (PENDING, replace(ADDRESSED, phase=PodPhase.PENDING), False),
        (None, POD, False),
        (ADDRESSED, None, False),
        # The ranks meet in the pod of rank 0.
        (None, replace(ADDRESSED, node_rank=1), False),
        (None, replace(ADDRESSED, attempt=2), False),
    ],
)
def test_only_the_pod_of_rank_0_wakes_the_pods_that_ask_for_its_address(
    old: ObservedPod | None, new: ObservedPod | None, moves: bool
) -> None:
    job = make_job()
    job = job.model_copy(update={"status": job.status.model_copy(update={"attempt": 1})})
    assert moves_the_meeting(job, cached_pod(old), cached_pod(new)) is moves
