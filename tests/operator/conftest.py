from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from testing.controlplane.process import wait_for
from testing.controlplane.server import ControlPlane
from testing.operator.harness import ACCOUNT, HOME, Jobs, OperatorProcess, build_job, install, running
from testing.operator.heartbeats import Talk, tls_context, tls_flags

NewOperator = Callable[..., OperatorProcess]


@pytest.fixture(scope="session")
def bed(control_plane: ControlPlane) -> ControlPlane:
    """A control plane with nodes, the CRD and the operator's role."""
    install(control_plane)
    control_plane.add_nodes(3, prefix="operator")
    return control_plane


@pytest.fixture
def jobs(bed: ControlPlane, namespace: str) -> Jobs:
    return Jobs(bed, namespace)


@pytest.fixture
def new_operator(bed: ControlPlane, namespace: str, tmp_path: Path) -> Iterator[NewOperator]:
    """Makes operators that look after the test's namespace only; all are ended in the end."""
    made: list[OperatorProcess] = []

    def new(*flags: str, **environment: str) -> OperatorProcess:
        process = OperatorProcess(
            bed.kubeconfig_for(ACCOUNT, HOME),
            tmp_path / f"operator-{len(made)}.log",
            (f"--namespaces={namespace}", f"--lease-name={namespace}", *flags),
            environment,
        )
        made.append(process)
        return process

    yield new
    for process in made:
        process.kill()


@pytest.fixture
def talk(jobs: Jobs, new_operator: NewOperator) -> Iterator[Talk]:
    cluster = jobs.control_plane
    with running(new_operator(*tls_flags(cluster))) as operator:
        jobs.create(build_job("circles"))
        wait_for("the pods run", lambda: all_run(jobs))
        yield Talk(jobs, operator, tls_context(cluster))


def all_run(jobs: Jobs) -> bool:
    pods = jobs.pods().values()
    return len(pods) == 2 and all(pod["status"]["phase"] == "Running" for pod in pods)
