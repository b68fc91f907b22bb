"""Health of a job in Argo CD and Flux by the expressions of the documentation, and no differences to a manifest in Git.

The expressions run in Lua and, for CEL, in the API server, on statuses that the plan writes.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_operator.api.job import API_VERSION, KIND
from testing.controlplane.api import ControlPlaneApiError
from testing.controlplane.process import wait_for
from testing.controlplane.server import KubectlError
from testing.operator.harness import Jobs, build_job, jobs_path, running
from tests.operator.conftest import NewOperator
from tests.plan.fake_cluster import FakeCluster, make_job

PAGE = (Path(__file__).parents[2] / "docs" / "gitops.md").read_text(encoding="utf-8")
POLICIES = "/apis/admissionregistration.k8s.io/v1"


def _running() -> FakeCluster:
    cluster = FakeCluster().running()
    cluster.train_to(10)
    cluster.settle()
    return cluster


def _succeeded() -> FakeCluster:
    cluster = _running()
    cluster.exit(0, 0)
    cluster.exit(1, 0)
    cluster.settle()
    return cluster


def _failed() -> FakeCluster:
    cluster = FakeCluster(make_job(activeDeadlineSeconds=60)).running()
    cluster.now += timedelta(minutes=2)
    cluster.settle()
    return cluster


def _suspended() -> FakeCluster:
    cluster = FakeCluster(make_job(suspend=True))
    cluster.settle()
    return cluster


def _refused() -> FakeCluster:
    cluster = FakeCluster(make_job(podTemplate={"spec": {"containers": "none"}}))
    cluster.settle()
    return cluster


def _edited() -> FakeCluster:
    cluster = _suspended()
    cluster.edit(suspend=False)
    return cluster


CASES: dict[str, tuple[Callable[[], FakeCluster], str, tuple[bool, bool, bool]]] = {
    "new": (FakeCluster, "Progressing", (True, False, False)),
    "running": (_running, "Progressing", (True, False, False)),
    "succeeded": (_succeeded, "Healthy", (False, False, True)),
    "failed": (_failed, "Degraded", (False, True, False)),
    "suspended": (_suspended, "Suspended", (False, False, True)),
    "refused": (_refused, "Degraded", (True, True, False)),
    "edited": (_edited, "Progressing", (True, False, False)),
}
"""A job in a state, its health in Argo CD, and whether it is in progress, failed and current for Flux."""


def record(cluster: FakeCluster) -> dict[str, Any]:
    """Return a job as the API server stores it."""
    found: dict[str, Any] = cluster.job.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_unset=True)
    status = cluster.job.status.model_dump(mode="json", by_alias=True, exclude_none=True)
    stored = {"phase", "reason", "message", "conditions", "observedGeneration"}
    return {**found, "status": {name: value for name, value in status.items() if name in stored}}


def _lua(value: Any) -> str:
    """Return a JSON value as a Lua expression."""
    if isinstance(value, dict):
        return "{" + ",".join(f"[{json.dumps(key)}]={_lua(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "{" + ",".join(map(_lua, value)) + "}"
    return json.dumps(value)


@pytest.mark.skipif(shutil.which("lua5.4") is None, reason="no Lua: the package lua5.4 is not installed")
@pytest.mark.parametrize("name", CASES)
def test_health_in_argo_cd(name: str) -> None:
    create, health, _ = CASES[name]
    (code,) = re.findall(r"```lua\n(.*?)```", PAGE, re.DOTALL)
    job = record(create())
    program = f"obj = {_lua(job)}\nlocal function health()\n{code}\nend\nhealth()\nprint(hs.status, hs.message)"
    done = subprocess.run(["lua5.4", "-"], input=program, capture_output=True, text=True, check=True)
    status, _, message = done.stdout.strip().partition("\t")
    assert status == health
    if health == "Degraded":
        assert message == job["status"]["message"] or "podTemplate" in message


@pytest.fixture
def evaluate(jobs: Jobs, namespace: str) -> Callable[[str, dict[str, Any]], tuple[bool, ...]]:
    """Return a function that evaluates the expressions of Flux for a job, in an admission policy of the API server."""
    (document,) = (yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
    (check,) = document["spec"]["healthCheckExprs"]
    assert (check["apiVersion"], check["kind"]) == (API_VERSION, KIND)
    api = jobs.control_plane.api
    # Flux names the parts of an object directly, a policy below `object`.
    texts = [
        re.sub(r"(?<![.\w])(status|metadata)\b", r"object.\1", check[key])
        for key in ("inProgress", "failed", "current")
    ]
    message = " + ',' + ".join(f"string({text})" for text in texts)
    rule = {
        "apiGroups": [API_VERSION.partition("/")[0]],
        "apiVersions": ["*"],
        "operations": ["UPDATE"],
        "resources": ["finetunejobs/status"],
    }
    selector = {"matchLabels": {"kubernetes.io/metadata.name": namespace}}
    policy = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicy",
        "metadata": {"name": namespace},
        "spec": {
            "matchConstraints": {"resourceRules": [rule], "namespaceSelector": selector},
            "validations": [{"expression": "false", "messageExpression": f"'flux:' + {message}"}],
        },
    }
    api.create(f"{POLICIES}/validatingadmissionpolicies", policy)
    binding = {
        **policy,
        "kind": "ValidatingAdmissionPolicyBinding",
        "spec": {"policyName": namespace, "validationActions": ["Deny"]},
    }
    api.create(f"{POLICIES}/validatingadmissionpolicybindings", binding)

    def evaluated(name: str, status: dict[str, Any]) -> tuple[bool, ...] | None:
        try:
            api.patch(f"{jobs_path(namespace, name)}/status?dryRun=All", {"status": status})
        except ControlPlaneApiError as error:
            found = re.search(r"flux:(\w+),(\w+),(\w+)", str(error))
            assert found is not None, error
            return tuple(word == "true" for word in found.groups())
        return None

    def wait(name: str, status: dict[str, Any]) -> tuple[bool, ...]:
        return wait_for("the policy is active", lambda: evaluated(name, status)) or ()

    return wait


@pytest.mark.cluster
def test_health_in_flux(jobs: Jobs, evaluate: Callable[[str, dict[str, Any]], tuple[bool, ...]]) -> None:
    generation = jobs.create(build_job("circles"))["metadata"]["generation"]
    found = {}
    for name, (create, _, _) in CASES.items():
        job = record(create())
        status = job["status"]
        if "observedGeneration" in status:
            status["observedGeneration"] += generation - job["metadata"]["generation"]
        found[name] = evaluate("circles", status)
    assert found == {name: flux for name, (_, _, flux) in CASES.items()}


@pytest.mark.cluster
def test_no_difference_to_a_manifest_in_git(jobs: Jobs, new_operator: NewOperator, tmp_path: Path) -> None:
    manifest = tmp_path / "job.yaml"
    job = build_job("circles", outputs=[{"format": "diffusers", "to": "lora"}])
    manifest.write_text(yaml.safe_dump(job), encoding="utf-8")
    kubectl = jobs.control_plane.kubectl
    arguments = ("-n", jobs.namespace, "-f", str(manifest))
    kubectl("apply", "--server-side", "--field-manager=argocd-controller", *arguments)
    with running(new_operator()):
        jobs.wait_phase("circles", "Running")
    stored = jobs.get("circles")
    managers = {entry["manager"]: entry.get("subresource", "") for entry in stored["metadata"]["managedFields"]}
    assert {name: part for name, part in managers.items() if part != "status"} == {"argocd-controller": ""}
    for mode in (("--server-side", "--field-manager=argocd-controller"), ()):
        try:
            assert kubectl("diff", *mode, *arguments) == ""
        except KubectlError as error:
            raise AssertionError(f"{error}") from None
