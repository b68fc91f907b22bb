"""Decoding of API objects, and the status of jobs that cannot be decoded."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from finetune_operator.api.job import CONTROLLER
from finetune_operator.cluster.kube.client.clock import ServerClock
from finetune_operator.cluster.kube.client.events import MAX_MESSAGE, build_event
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


def test_resource_paths() -> None:
    assert JOBS.path() == "/apis/finetune-operator.io/v1alpha1/finetunejobs"
    assert JOBS.path("team", "circles", "status").endswith("/namespaces/team/finetunejobs/circles/status")


def test_metrics_name_the_resource_type_and_not_the_object() -> None:
    assert resource_of(JOBS.path("team", "circles", "status")) == "finetunejobs/status"
    assert resource_of("/api/v1/namespaces/team/pods/circles-a1-n0") == "pods"
    assert resource_of("/api/v1/nodes") == "nodes"


def test_deleted_jobs_and_jobs_of_other_controllers_are_not_cached() -> None:
    job = stored()
    assert decode_job(job) is not None
    assert decode_job({**job, "metadata": {**job["metadata"], "deletionTimestamp": "2026-01-01T00:00:00Z"}}) is None
    assert decode_job({**job, "spec": {**job["spec"], "managedBy": "kueue.x-k8s.io/multikueue"}}) is None
    assert decode_job({**job, "spec": {**job["spec"], "managedBy": CONTROLLER}}) is not None


def test_unreadable_job_is_reported_once() -> None:
    job = stored(training={"method": "Alchemy", "steps": 1})
    cached = decode_job(job)
    assert cached is not None
    assert cached.job is None
    body = refusal_body(cached, NOW)
    assert body is not None
    (accepted,) = body["status"]["conditions"]
    assert (accepted["type"], accepted["status"], accepted["reason"]) == ("Accepted", "False", "InvalidSpec")
    assert "spec.training.method" in accepted["message"]
    assert body["metadata"] == {"resourceVersion": "7", "uid": "u"}
    reported = decode_job({**job, "status": body["status"]})
    assert reported is not None
    assert refusal_body(reported, NOW.replace(year=2027)) is None


def test_fields_of_a_newer_crd_are_ignored() -> None:
    job = stored()
    job["spec"]["dataset"]["flavour"] = "vanilla"
    job["status"] = {"attempt": 1, "mood": "good"}
    cached = decode_job(job)
    assert cached is not None
    assert cached.job is not None
    assert cached.job.status.attempt == 1


def test_objects_without_a_job_are_not_cached() -> None:
    meta = {"name": "x", "namespace": "team", "uid": "u", "creationTimestamp": "2026-01-01T00:00:00Z"}
    assert decode_child({"metadata": meta}) is None
    labels = {"finetune-operator.io/job": "circles", "finetune-operator.io/attempt": "1"}
    assert decode_child({"metadata": {**meta, "labels": labels}}) is None, "no owner"
    owner = {"kind": "FineTuneJob", "uid": "o", "controller": True}
    owned = {"metadata": {**meta, "labels": labels, "ownerReferences": [owner]}, "spec": {}}
    assert decode_child(owned) is not None
    assert decode_pod(owned) is None, "no node rank"


def test_equal_events_have_equal_names() -> None:
    cached = decode_job(stored())
    assert cached is not None
    assert cached.job is not None

    def name(message: str) -> str:
        assert cached.job is not None
        return str(build_event(cached.job, Event("Accepted", message), NOW, "me")["metadata"]["name"])

    assert name("a") == name("a") != name("b")
    assert len(build_event(cached.job, Event("Accepted", "x" * 5000), NOW, "me")["message"]) == MAX_MESSAGE


def test_clock_follows_the_server_only_if_the_difference_is_large() -> None:
    monotonic = iter(float(100 * number) for number in range(20))
    clock = ServerClock(wall=lambda: NOW, monotonic=lambda: next(monotonic))
    clock.sync("Thu, 01 Jan 2026 00:00:01 GMT")
    assert clock() == NOW, "one second is within the tolerance"
    clock.sync("Thu, 01 Jan 2026 00:05:00 GMT")
    assert clock() == NOW.replace(minute=5)
    clock.sync("no date")
    clock.sync(None)
    assert clock() == NOW.replace(minute=5)
