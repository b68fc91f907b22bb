from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from testing.controlplane.process import wait_for
from testing.controlplane.server import ControlPlane
from testing.operator.harness import ACCOUNT, HOME, Jobs, OperatorProcess, build_job, install, running
from testing.operator.heartbeats import HeartbeatClient, tls_context, tls_flags

NewOperator = Callable[..., OperatorProcess]


@pytest.fixture(scope="session")
def prepared_control_plane(control_plane: ControlPlane) -> ControlPlane:
    """Return a control plane with nodes, the CRD and the operator's role."""
    install(control_plane)
    control_plane.add_nodes(3, prefix="operator")
    return control_plane


@pytest.fixture
def jobs(prepared_control_plane: ControlPlane, namespace: str) -> Jobs:
    return Jobs(prepared_control_plane, namespace)


@pytest.fixture
def new_operator(prepared_control_plane: ControlPlane, namespace: str, tmp_path: Path) -> Iterator[NewOperator]:
    """Return a function that creates operators for the test's namespace; all are killed at the end."""
    created: list[OperatorProcess] = []

    def new(*flags: str, **environment: str) -> OperatorProcess:
        process = OperatorProcess(
            prepared_control_plane.kubeconfig_for(ACCOUNT, HOME),
            tmp_path / f"operator-{len(created)}.log",
            (f"--namespaces={namespace}", f"--lease-name={namespace}", *flags),
            environment,
        )
        created.append(process)
        return process

    yield new
    for process in created:
        process.kill()


@pytest.fixture
def client(jobs: Jobs, new_operator: NewOperator) -> Iterator[HeartbeatClient]:
    cluster = jobs.control_plane
    with running(new_operator(*tls_flags(cluster))) as operator:
        jobs.create(build_job("circles"))
        wait_for("the pods run", lambda: all_run(jobs))
        yield HeartbeatClient(jobs, operator, tls_context(cluster))


def all_run(jobs: Jobs) -> bool:
    pods = jobs.pods().values()
    return len(pods) == 2 and all(pod["status"]["phase"] == "Running" for pod in pods)
