from __future__ import annotations

from collections.abc import Iterator

import pytest

from testing.controlplane.build import HELM, ensure_programs
from testing.controlplane.server import ControlPlane
from testing.helm import HOME, Helm


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """Helm without a cluster."""
    return Helm(ensure_programs(modules=(HELM,))["helm"], tmp_path_factory.mktemp("helm"))


@pytest.fixture(scope="package")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane of its own: the chart brings the CRD, which elsewhere is there from the start."""
    with ControlPlane(folder=tmp_path_factory.mktemp("chart-control-plane")) as running:
        running.create_namespace(HOME, {"pod-security.kubernetes.io/enforce": "restricted"})
        yield running


@pytest.fixture
def cluster_helm(helm: Helm, control_plane: ControlPlane) -> Helm:
    """Helm as an administrator of the control plane."""
    return Helm(helm.program, helm.folder, control_plane.kubeconfig)
