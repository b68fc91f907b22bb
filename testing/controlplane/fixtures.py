"""Pytest plugin: one control plane per test run, and a namespace of its own for each test.

A test that takes `control_plane` or `namespace` is marked `cluster`. With pytest-xdist each worker that runs such a
test has a control plane of its own: a test may stop the API server without another one noticing.
"""

from __future__ import annotations

import uuid
from collections.abc import Generator, Iterator

import pytest

from testing.controlplane.build import ALL_MODULES, HELM, ensure_programs
from testing.controlplane.server import ControlPlane


def _uses_control_plane(item: pytest.Item) -> bool:
    return "control_plane" in getattr(item, "fixturenames", ())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a control plane, before `-m` chooses."""
    for item in filter(_uses_control_plane, items):
        item.add_marker(pytest.mark.cluster)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Build the programs before the first test: a cold build takes longer than a test may."""
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
    """Say where the logs are under a test that failed, and show them where a program ended."""
    report = yield
    control_plane = getattr(item, "funcargs", {}).get("control_plane")
    if report.failed and isinstance(control_plane, ControlPlane):
        died = any(program.died for program in control_plane.programs)
        report.sections.append(("control plane", control_plane.tails() if died else str(control_plane.folder / "logs")))
    return report


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """The test run's control plane: every component, requests audited."""
    with ControlPlane(folder=tmp_path_factory.mktemp("control-plane"), audit=True) as running:
        yield running


@pytest.fixture
def namespace(control_plane: ControlPlane) -> Iterator[str]:
    """A fresh namespace; it is deleted at the end, and nobody waits for that."""
    name = control_plane.create_namespace(f"test-{uuid.uuid4().hex[:8]}")
    yield name
    if not control_plane.program("kube-apiserver").running:
        # A test of faults failed halfway; the next test is not to fail for that.
        control_plane.start_api_server()
    control_plane.api.delete(f"/api/v1/namespaces/{name}")
