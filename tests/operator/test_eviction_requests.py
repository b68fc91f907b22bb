"""Eviction requests on a real API server. A CRD stands in for the API, which Kubernetes has from 1.37 on (alpha)."""

from __future__ import annotations

from typing import Any

from finetune_operator.api.evictions import API_VERSION, RESPONDER
from testing.controlplane.definitions import CRDS, await_established
from testing.controlplane.process import wait_for
from testing.operator.harness import Jobs, build_job, granted, running
from tests.operator.conftest import NewOperator

NAME = "evictions.lifecycle.k8s.io"
TIME = {"type": "string", "format": "date-time"}
TEXT = {"type": "string"}


def list_of(**fields: Any) -> dict[str, Any]:
    """Return the schema of a list whose entries have a name."""
    items = {"type": "object", "properties": {"name": TEXT, **fields}, "required": ["name"]}
    keys = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}
    return {"type": "array", "items": items, **keys}


def install_stand_in(jobs: Jobs) -> None:
    """Install the stand-in: the fields of the API that the operator reads or writes, with the same types of lists."""
    pod = {"type": "object", "properties": {"name": TEXT, "uid": TEXT}}
    target = {"type": "object", "properties": {"pod": pod}}
    responders = list_of(startTime=TIME, heartbeatTime=TIME, completionTime=TIME, message=TEXT)
    status = {"targetResponders": list_of(priority={"type": "integer"}, state=TEXT), "responders": responders}
    schema = {
        "type": "object",
        "properties": {
            "spec": {"type": "object", "properties": {"target": target}},
            "status": {"type": "object", "properties": status},
        },
    }
    version = {"name": "v1alpha1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
    spec = {
        "group": "lifecycle.k8s.io",
        "names": {"kind": "Eviction", "plural": "evictions", "singular": "eviction", "listKind": "EvictionList"},
        "scope": "Namespaced",
        "versions": [{**version, "subresources": {"status": {}}}],
    }
    meta = {"name": NAME, "annotations": {"api-approved.kubernetes.io": "unapproved, a stand-in for tests"}}
    definition = {"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": meta}
    api = jobs.control_plane.api
    api.patch(f"{CRDS}/{NAME}?fieldManager=test&force=true", {**definition, "spec": spec}, "apply")
    await_established(jobs.control_plane, NAME)


def request_eviction(jobs: Jobs, pod: str) -> str:
    """Ask for the eviction of a pod, as Kubernetes does when it is the operator's turn; return the path."""
    uid = jobs.pods()[pod]["metadata"]["uid"]
    path = f"/apis/{API_VERSION}/namespaces/{jobs.namespace}/evictions"
    meta = {"name": "drain", "labels": {RESPONDER: "responder"}}
    spec = {"target": {"pod": {"name": pod, "uid": uid}}}
    api = jobs.control_plane.api
    api.create(path, {"apiVersion": API_VERSION, "kind": "Eviction", "metadata": meta, "spec": spec})
    other = {"name": "imperative-eviction.k8s.io/evictor", "priority": 100, "state": "Inactive"}
    own = {"name": RESPONDER, "priority": 10000, "state": "Active"}
    started = {"name": RESPONDER, "startTime": "2026-01-01T00:00:00Z"}
    api.patch(f"{path}/drain/status", {"status": {"targetResponders": [own, other], "responders": [started]}})
    return f"{path}/drain"


def test_requested_pod_saves_reports_and_is_released(jobs: Jobs, new_operator: NewOperator) -> None:
    """With exactly the role of the chart."""
    install_stand_in(jobs)
    granting = granted(jobs.control_plane, "evictionRequests")
    with granting, running(new_operator("--eviction-requests=true")):
        jobs.create(build_job("circles", recovery={"noticeSeconds": 1}))
        jobs.wait_phase("circles", "Running")
        path = request_eviction(jobs, "circles-a1-n1")

        def own() -> dict[str, Any]:
            entries = jobs.control_plane.api.get(path)["status"]["responders"]
            return next(entry for entry in entries if entry["name"] == RESPONDER)

        wait_for("the pod is released", lambda: own().get("completionTime"))
        assert "circles-a1-n1" not in jobs.pods()
        entry = own()
        assert entry["startTime"] == "2026-01-01T00:00:00Z"
        assert entry["heartbeatTime"] <= entry["completionTime"]
        assert entry["message"].startswith("the pod is released")
        first = jobs.wait_attempt("circles", 2)["attempts"][0]
        assert (first["countsAs"], first["pod"]) == ("Preemption", "circles-a1-n1")
        assert "EvictionRequest" in first["message"]
