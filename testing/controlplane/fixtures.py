"""Pytest plugin: one control plane per test run, and a separate namespace for each test.

A test that uses `control_plane` or `namespace` is marked `cluster`. With pytest-xdist, each worker that runs such a
test has its own control plane: a test may stop the API server without affecting the other workers.
"""

from __future__ import annotations

import uuid
from collections.abc import Generator, Iterator
from typing import Any

import pytest

from testing.controlplane.api import Api, ControlPlaneApiError
from testing.controlplane.build import ALL_MODULES, HELM, ensure_programs
from testing.controlplane.server import ControlPlane


def _uses_control_plane(item: pytest.Item) -> bool:
    return "control_plane" in getattr(item, "fixturenames", ())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that need a control plane, before `-m` selects."""
    for item in filter(_uses_control_plane, items):
        item.add_marker(pytest.mark.cluster)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Build the programs before the first test, because a first build takes longer than a test's timeout."""
    if session.config.option.collectonly:
        return
    if any(map(_uses_control_plane, session.items)):
        ensure_programs()
    if any("helm" in getattr(item, "fixturenames", ()) for item in session.items):
        ensure_programs(modules=(*ALL_MODULES, HELM))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the path of the logs to the report of a failed test, or their last lines if a program has exited."""
    report = yield
    control_plane = getattr(item, "funcargs", {}).get("control_plane")
    if report.failed and isinstance(control_plane, ControlPlane):
        exited = any(program.has_exited for program in control_plane.programs)
        text = control_plane.tails() if exited else str(control_plane.folder / "logs")
        report.sections.append(("control plane", text))
        if not exited:
            report.sections.append(("objects", dump(control_plane.api, getattr(item, "funcargs", {}).get("namespace"))))
    return report


def dump(api: Api, namespace: str | None) -> str:
    """Return one line for each node, and for each pod and event of a namespace: what a failed test saw."""
    try:
        lines = [_describe_node(node) for node in api.get("/api/v1/nodes")["items"]]
        if namespace is not None:
            path = f"/api/v1/namespaces/{namespace}"
            lines += [_describe_pod(pod) for pod in api.get(f"{path}/pods")["items"]]
            lines += [f"event {event['reason']}: {event['message']}" for event in api.get(f"{path}/events")["items"]]
    except (OSError, ControlPlaneApiError) as error:
        return f"cannot read the objects: {error}"
    return "\n".join(lines)


def _describe_node(node: dict[str, Any]) -> str:
    taints = [f"{taint['key']}:{taint['effect']}" for taint in node["spec"].get("taints", [])]
    return f"node {node['metadata']['name']} {_conditions(node)} taints={taints}"


def _describe_pod(pod: dict[str, Any]) -> str:
    where, phase = pod["spec"].get("nodeName"), pod["status"].get("phase")
    return f"pod {pod['metadata']['name']} {phase} on {where} {_conditions(pod)}"


def _conditions(manifest: dict[str, Any]) -> str:
    conditions = manifest["status"].get("conditions", [])
    return ", ".join(f"{c['type']}={c['status']} ({c.get('message') or c.get('reason')})" for c in conditions)


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """The control plane of this test run: all components, with an audit log."""
    with ControlPlane(folder=tmp_path_factory.mktemp("control-plane"), audit=True) as running:
        yield running


@pytest.fixture
def namespace(control_plane: ControlPlane) -> Iterator[str]:
    """Create a namespace, and request its deletion at the end without waiting."""
    name = control_plane.create_namespace(f"test-{uuid.uuid4().hex[:8]}")
    yield name
    if not control_plane.program("kube-apiserver").running:
        # A fault test failed while the API server was stopped; the following tests need it.
        control_plane.start_api_server()
    control_plane.api.delete(f"/api/v1/namespaces/{name}")
