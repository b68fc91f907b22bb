"""What is read of objects, and what is written of a job that cannot be read."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from finetune_operator.api.job import CONTROLLER
from finetune_operator.cluster.kube.client.clock import ServerClock
from finetune_operator.cluster.kube.client.events import MAX_NOTE, build_event
from finetune_operator.cluster.kube.client.objects import (
    JOBS,
    decode_child,
    decode_job,
    decode_pod,
    refusal_body,
)
from finetune_operator.metrics import resource_of
from finetune_operator.plan.model.types import Event
from testing.operator.harness import build_job

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def stored(**spec: Any) -> dict[str, Any]:
    job = build_job("circles", **spec)
    job["metadata"] |= {"namespace": "team", "uid": "u", "resourceVersion": "7", "generation": 2}
    return job


def test_paths() -> None:
    assert JOBS.path() == "/apis/finetune-operator.io/v1alpha1/finetunejobs"
    assert JOBS.path("team", "circles", "status").endswith("/namespaces/team/finetunejobs/circles/status")


def test_metrics_name_the_kind_and_never_the_object() -> None:
    assert resource_of(JOBS.path("team", "circles", "status")) == "finetunejobs/status"
    assert resource_of("/api/v1/namespaces/team/pods/circles-a1-n0") == "pods"
    assert resource_of("/api/v1/nodes") == "nodes"


def test_jobs_that_are_deleted_or_somebody_elses_are_not_kept() -> None:
    job = stored()
    assert decode_job(job) is not None
    assert decode_job({**job, "metadata": {**job["metadata"], "deletionTimestamp": "2026-01-01T00:00:00Z"}}) is None
    assert decode_job({**job, "spec": {**job["spec"], "managedBy": "kueue.x-k8s.io/multikueue"}}) is None
    assert decode_job({**job, "spec": {**job["spec"], "managedBy": CONTROLLER}}) is not None


def test_a_job_that_cannot_be_read_says_so_once() -> None:
    job = stored(training={"method": "Alchemy", "steps": 1})
    kept = decode_job(job)
    assert kept is not None
    assert kept.job is None
    body = refusal_body(kept, NOW)
    assert body is not None
    (accepted,) = body["status"]["conditions"]
    assert (accepted["type"], accepted["status"], accepted["reason"]) == ("Accepted", "False", "InvalidSpec")
    assert "spec.training.method" in accepted["message"]
    assert body["metadata"] == {"resourceVersion": "7", "uid": "u"}
    again = decode_job({**job, "status": body["status"]})
    assert again is not None
    assert refusal_body(again, NOW.replace(year=2027)) is None


def test_fields_of_a_newer_crd_are_passed_over() -> None:
    job = stored()
    job["spec"]["dataset"]["flavour"] = "vanilla"
    job["status"] = {"attempt": 1, "mood": "good"}
    kept = decode_job(job)
    assert kept is not None
    assert kept.job is not None
    assert kept.job.status.attempt == 1


def test_children_without_a_job_are_not_kept() -> None:
    meta = {"name": "x", "namespace": "team", "uid": "u", "creationTimestamp": "2026-01-01T00:00:00Z"}
    assert decode_child({"metadata": meta}) is None
    labels = {"finetune-operator.io/job": "circles", "finetune-operator.io/attempt": "1"}
    assert decode_child({"metadata": {**meta, "labels": labels}}) is None, "it has no owner"
    owner = {"kind": "FineTuneJob", "uid": "o", "controller": True}
    owned = {"metadata": {**meta, "labels": labels, "ownerReferences": [owner]}, "spec": {}}
    assert decode_child(owned) is not None
    assert decode_pod(owned) is None, "it has no node rank"


def test_an_event_that_says_the_same_has_the_same_name() -> None:
    kept = decode_job(stored())
    assert kept is not None
    assert kept.job is not None

    def name(message: str) -> str:
        assert kept.job is not None
        return str(build_event(kept.job, Event("Accepted", message), NOW, "me")["metadata"]["name"])

    assert name("a") == name("a") != name("b")
    assert len(build_event(kept.job, Event("Accepted", "x" * 5000), NOW, "me")["message"]) == MAX_NOTE


def test_the_servers_clock_counts_where_it_is_far_from_ours() -> None:
    monotonic = iter(float(100 * number) for number in range(20))
    clock = ServerClock(wall=lambda: NOW, monotonic=lambda: next(monotonic))
    clock.hear("Thu, 01 Jan 2026 00:00:01 GMT")
    assert clock() == NOW, "a second is no difference"
    clock.hear("Thu, 01 Jan 2026 00:05:00 GMT")
    assert clock() == NOW.replace(minute=5)
    clock.hear("no date")
    clock.hear(None)
    assert clock() == NOW.replace(minute=5)
