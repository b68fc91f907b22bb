"""Kueue's real controller for the tests of queues. Its first build takes about ten minutes: `make test-queue`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from testing.controlplane.queues import Kueue
from testing.controlplane.server import ControlPlane
from testing.operator.harness import ACCOUNT, HOME, Jobs, OperatorProcess, install, running

VARIABLE = "FINETUNE_KUEUE"
"""Environment variable that enables these tests."""
PREEMPTION = {"withinClusterQueue": "LowerPriority", "reclaimWithinCohort": "Any"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests unless they are requested."""
    for item in items:
        if Path(__file__).parent in item.path.parents and os.environ.get(VARIABLE) != "1":
            item.add_marker(pytest.mark.skip(reason="Kueue is not built"))


@pytest.fixture(scope="session")
def queue_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ControlPlane, Kueue]]:
    """Return a control plane with Kueue, the role of an operator that uses queues, nodes, flavors and priorities."""
    with ControlPlane(folder=tmp_path_factory.mktemp("queue-plane")) as plane, Kueue(plane) as kueue:
        install(plane, queues=True)
        plane.add_nodes(4, cpu="4", labels={"pool": "pictures"})
        toleration = {"key": "pictures", "operator": "Exists", "effect": "NoSchedule"}
        kueue.apply("resourceflavors", "pool", {"nodeLabels": {"pool": "pictures"}, "tolerations": [toleration]})
        kueue.apply("workloadpriorityclasses", "high", {"value": 1000})
        yield plane, kueue


@pytest.fixture
def team(queue_plane: tuple[ControlPlane, Kueue], request: pytest.FixtureRequest) -> Jobs:
    """Return the jobs of a new namespace with a queue of its own for two CPUs."""
    plane, kueue = queue_plane
    name = request.node.name.replace("_", "-")[:40].strip("-")
    namespace = plane.create_namespace(name)
    kueue.add_queue(name, namespace, [{"name": "pool", "cpu": 2, "memory": "64Gi"}], preemption=PREEMPTION)
    return Jobs(plane, namespace)


@pytest.fixture
def operator(queue_plane: tuple[ControlPlane, Kueue], team: Jobs, tmp_path: Path) -> Iterator[OperatorProcess]:
    plane, _ = queue_plane
    flags = (f"--namespaces={team.namespace}", f"--lease-name={team.namespace}", "--kueue=true")
    with running(OperatorProcess(plane.kubeconfig_for(ACCOUNT, HOME), tmp_path / "operator.log", flags)) as process:
        yield process
