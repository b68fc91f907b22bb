from __future__ import annotations

from collections.abc import Iterator

import pytest

from testing.controlplane.build import HELM, ensure_programs
from testing.controlplane.server import ControlPlane
from testing.helm import HOME, Helm


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """Return Helm without a cluster."""
    return Helm(ensure_programs(modules=(HELM,))["helm"], tmp_path_factory.mktemp("helm"))


@pytest.fixture(scope="package")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """Start a separate control plane without the CRD, because the chart installs it."""
    with ControlPlane(folder=tmp_path_factory.mktemp("chart-control-plane")) as running:
        running.create_namespace(HOME, {"pod-security.kubernetes.io/enforce": "restricted"})
        yield running


@pytest.fixture
def cluster_helm(helm: Helm, control_plane: ControlPlane) -> Helm:
    """Return Helm with administrator access to the control plane."""
    return Helm(helm.program, helm.folder, control_plane.kubeconfig)
