from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from finetune_contract.heartbeat import CommittedCheckpoint, Heartbeat, RankEnd, RankReport, RankState
from finetune_contract.phase import Phase
from finetune_operator.api.job import AttemptStatus, FineTuneJobStatus
from finetune_operator.cluster.kube.beats.pace import BeatPace
from finetune_operator.cluster.kube.beats.store import JobBeats
from finetune_operator.cluster.kube.client.objects import KubeJob, KubePod
from finetune_operator.cluster.kube.watch.nodes import GONE, MAX_GONE, NodeBook, read_node
from finetune_operator.cluster.kube.work.urgency import (
    Gang,
    Urgency,
    beat_news,
    is_over,
    is_progress,
    job_news,
    pod_news,
)
from finetune_operator.cluster.protocol import JobKey
from finetune_operator.plan.model.types import WELL, ObservedNode, ObservedPod, PodPhase
from finetune_operator.settings import Settings
from tests.plan.harness import make_job

NOW = datetime(2026, 1, 1, tzinfo=UTC)
POD = ObservedPod("job-a1-n0", "uid", 1, 0, PodPhase.RUNNING, NOW, node="node-1", ready=True)
PENDING = replace(POD, phase=PodPhase.PENDING, node=None, ready=False)
MAKING = Gang(size=4, num_pods=2, num_ready=1, over=False)
WHOLE = Gang(size=4, num_pods=4, num_ready=4, over=False)
CLEARING = Gang(size=4, num_pods=2, num_ready=2, over=True)


def kept(pod: ObservedPod | None) -> KubePod | None:
    return None if pod is None else KubePod(JobKey("ns", "job"), "owner", pod)


@pytest.mark.parametrize(
    ("old", "new", "gang", "urgency"),
    [
        (None, PENDING, MAKING, Urgency.PROGRESS),
        (None, PENDING, replace(WHOLE, num_ready=0), Urgency.PROGRESS),
        (None, PENDING, replace(WHOLE, num_ready=3), Urgency.PROGRESS),
        (PENDING, PENDING, MAKING, Urgency.NEVER),
        (PENDING, POD, MAKING, Urgency.PROGRESS),
        (PENDING, POD, WHOLE, Urgency.SOON),
        (POD, replace(POD, deleted_at=NOW), WHOLE, Urgency.NOW),
        (POD, replace(POD, disruption="EvictionByEvictionAPI"), WHOLE, Urgency.NOW),
        (POD, replace(POD, phase=PodPhase.FAILED, exit_code=1), MAKING, Urgency.NOW),
        (None, replace(POD, phase=PodPhase.FAILED), MAKING, Urgency.NOW),
        (POD, None, MAKING, Urgency.NOW),
        (POD, replace(POD, deleted_at=NOW), CLEARING, Urgency.PROGRESS),
        (POD, replace(POD, phase=PodPhase.FAILED), CLEARING, Urgency.NOW),
        (POD, None, CLEARING, Urgency.PROGRESS),
        (POD, None, replace(CLEARING, num_pods=0), Urgency.NOW),
    ],
)
def test_pods(old: ObservedPod | None, new: ObservedPod | None, gang: Gang, urgency: Urgency) -> None:
    assert pod_news(kept(old), kept(new), gang) is urgency


def kept_job(generation: int = 1, uid: str = "owner", **status: Any) -> KubeJob:
    job = make_job()
    meta = job.metadata.model_copy(update={"generation": generation, "uid": uid})
    job = job.model_copy(update={"metadata": meta, "status": FineTuneJobStatus(**status)})
    return KubeJob(JobKey("ns", "job"), uid, "1", job)


FIRST = AttemptStatus(attempt=1, started_at=NOW)
AT_WORK: dict[str, Any] = {"attempt": 1, "attempts": (FIRST,), "phase": Phase.RUNNING, "step": 1}


@pytest.mark.parametrize(
    ("old", "new", "urgency"),
    [
        (None, kept_job(), Urgency.NOW),
        (kept_job(), None, Urgency.NOW),
        (kept_job(), kept_job(generation=2), Urgency.NOW),
        (kept_job(), kept_job(uid="another"), Urgency.NOW),
        (kept_job(), kept_job(**AT_WORK), Urgency.NOW),
        (
            kept_job(**AT_WORK),
            kept_job(**AT_WORK | {"attempts": (FIRST.model_copy(update={"ended_at": NOW}),)}),
            Urgency.NOW,
        ),
        (kept_job(**AT_WORK), kept_job(**AT_WORK | {"phase": Phase.EXPORTING}), Urgency.SOON),
        (kept_job(**AT_WORK), kept_job(**AT_WORK | {"step": 2, "loss": 0.1}), Urgency.PROGRESS),
    ],
)
def test_jobs(old: KubeJob | None, new: KubeJob | None, urgency: Urgency) -> None:
    assert job_news(old, new) is urgency


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
        (beat(), beat(ends=(RankEnd(rank=0, exit_code=1),)), Urgency.NOW),
        (beat(notice=True), beat(notice=True, step=2), Urgency.PROGRESS),
    ],
)
def test_beats(old: Heartbeat | None, new: Heartbeat, urgency: Urgency) -> None:
    assert beat_news(old, new) is urgency


STATUS = FineTuneJobStatus(phase=Phase.RUNNING, attempt=1, attempts=(AttemptStatus(attempt=1, started_at=NOW),))
ENTRY = STATUS.attempts[0]


@pytest.mark.parametrize(
    ("changes", "progress"),
    [
        ({}, True),
        ({"step": 3, "eta": "4m", "loss": 0.1}, True),
        ({"attempts": (ENTRY.model_copy(update={"to_step": 3, "progress_at": NOW}),)}, True),
        ({"attempts": (ENTRY.model_copy(update={"gang_complete": True}),)}, False),
        ({"step": 3, "phase": Phase.EXPORTING}, False),
        ({"attempt": 2}, False),
    ],
)
def test_progress(changes: dict[str, Any], progress: bool) -> None:
    assert is_progress(STATUS, STATUS.model_copy(update=changes)) is progress


def test_an_attempt_is_over_with_its_cause_or_with_the_next_one() -> None:
    assert not is_over(STATUS, 1)
    assert is_over(STATUS, 0)
    assert is_over(STATUS.model_copy(update={"attempts": (ENTRY.model_copy(update={"reason": "PodLost"}),)}), 1)


# --- nodes -----------------------------------------------------------------------------------------------------------


def node(ready: str = "True", *taints: str) -> dict[str, Any]:
    return {
        "spec": {"taints": [{"key": key, "effect": "NoSchedule"} for key in taints]},
        "status": {"conditions": [{"type": "Ready", "status": ready}]},
    }


def leaving(taint: str) -> ObservedNode:
    return ObservedNode(leaving=taint)


AWS = "aws-node-termination-handler/spot-itn"
GKE = "cloud.google.com/impending-node-termination"
AKS = "remediator.kubernetes.azure.com/unschedulable"


@pytest.mark.parametrize(
    ("seen", "state"),
    [
        (node(), WELL),
        (node("False"), WELL),
        (node("Unknown"), ObservedNode(lost=True)),
        (node("True", "example.com/other", "karpenter.sh/disrupted"), leaving("karpenter.sh/disrupted")),
        (node("True", "node.kubernetes.io/unreachable"), ObservedNode(lost=True)),
        (node("True", "node.kubernetes.io/unschedulable"), WELL),
        (node("True", AWS), leaving(AWS)),
        (node("True", GKE), leaving(GKE)),
        (node("True", AKS), leaving(AKS)),
        ({}, WELL),
    ],
)
def test_what_is_read_of_a_node(seen: dict[str, Any], state: ObservedNode) -> None:
    assert read_node(seen) == state


def test_nodes_tell_of_changes_only() -> None:
    told: list[str] = []
    book = NodeBook(told.append)
    for state in (WELL, GONE, GONE, WELL, WELL):
        book.see("node-1", state)
    assert told == ["node-1", "node-1"]
    assert book.of(None) == WELL


def test_nodes_that_went_are_not_remembered_for_ever() -> None:
    book = NodeBook(lambda _: None)
    for number in range(MAX_GONE + 2):
        book.see(f"node-{number}", GONE)
    assert book.of("node-1") == WELL
    assert book.of("node-2") == GONE


# --- beats -----------------------------------------------------------------------------------------------------------


def test_many_that_wait_beat_no_more_often_than_all_may() -> None:
    pace = BeatPace(Settings(), beats_per_second=500)
    assert pace.hurry(1.0, 3) == 1.0
    assert pace.hurry(1.0, 3000) == 24.0


def test_those_who_wait_are_counted_until_they_wait_no_more() -> None:
    book, told = JobBeats(lambda *_: None), beat()
    for uid in ("a", "b", "c"):
        book.take(told.model_copy(update={"pod_uid": uid, "waiting": True}), NOW)
    assert book.num_waiting == 3
    book.take(told.model_copy(update={"pod_uid": "a", "sequence": told.sequence + 1}), NOW)
    assert book.num_waiting == 2
    book.of(told.namespace, told.job, oldest_attempt=told.attempt + 1)
    assert book.num_waiting == 0
    book.take(told.model_copy(update={"waiting": True}), NOW)
    book.forget(JobKey(told.namespace, told.job))
    assert book.num_waiting == 0


def test_with_more_pods_each_beats_less_often_and_is_waited_for_longer() -> None:
    pace = BeatPace(Settings(), beats_per_second=500)
    assert pace.ask(100, 0.0) == 5.0
    assert pace.ask(4000, 1.0) == pace.expected(1.0) == 8.0
    assert pace.ask(10**6, 2.0) == pace.expected(2.0) == 20.0
    # Who was asked before does not know yet.
    assert pace.ask(100, 3.0) == 5.0
    assert pace.expected(22.9) == 20.0
    assert pace.expected(23.1) == 5.0
