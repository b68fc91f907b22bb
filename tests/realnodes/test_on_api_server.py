"""Parts of the cluster test that need an API server but no nodes: volumes, and removal of leftovers."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from testing.controlplane.build import HELM, ensure_programs
from testing.controlplane.process import wait_for
from testing.controlplane.server import ControlPlane
from testing.helm import CHART, Helm
from testing.realnodes import store
from testing.realnodes.job import make_namespace
from testing.realnodes.names import CRD, FAULT_TAINT, HOME, OURS, RELEASE, TEAM
from testing.realnodes.user_cluster import RefusedError, UserCluster
from testing.realnodes.volumes import VOLUMES, Volumes, phase

SECONDS = 60.0


@pytest.fixture(scope="module")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """Start a control plane without the CRD. It is not shared, because the tests use the object names of a run."""
    components = {"kube-controller-manager", "kwok"}
    with ControlPlane(components, folder=tmp_path_factory.mktemp("realnodes-control-plane")) as running:
        yield running


@pytest.fixture
def cluster(control_plane: ControlPlane) -> UserCluster:
    """Return the control plane as a cluster of the user."""
    return UserCluster(control_plane.kubectl_path, control_plane.kubeconfig)


def discard(_: str) -> None:
    """Discard progress messages."""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make the user of the jobs own the volumes")
def test_every_claim_gets_its_own_volume(control_plane: ControlPlane, cluster: UserCluster, tmp_path: Path) -> None:
    make_namespace(cluster, TEAM)
    volumes = Volumes(control_plane.api, tmp_path)
    volumes.start()
    claims = f"/api/v1/namespaces/{TEAM}/persistentvolumeclaims"
    bound: set[str] = set()

    def is_bound(name: str) -> bool:
        volumes.maintain()
        claim = control_plane.api.get(f"{claims}/{name}")
        if phase(claim) == "Bound":
            bound.add(claim["spec"]["volumeName"])
        return phase(claim) == "Bound"

    for name in ("a", "b", "c"):
        store.apply(cluster, store.claim(name, storage_class=None))
        wait_for(f"{name} is bound", functools.partial(is_bound, name), SECONDS)
    assert len(bound) == 3
    assert all((tmp_path / name).stat().st_uid == store.USER for name in bound)
    cluster.kubectl("delete", "namespace", TEAM)

    def volumes_are_removed() -> bool:
        volumes.maintain()
        left = {volume["metadata"]["name"] for volume in control_plane.api.get(VOLUMES)["items"]}
        return not bound & left and not any((tmp_path / name).exists() for name in bound)

    wait_for("their volumes are removed", volumes_are_removed, SECONDS)


def test_leftovers_of_a_killed_run_are_removed(
    control_plane: ControlPlane, cluster: UserCluster, tmp_path: Path
) -> None:
    control_plane.add_nodes(1, prefix="left")
    (node,) = cluster.kubectl("get", "nodes", "--output=name").split()
    cluster.prepare(discard)
    for name in (HOME, TEAM):
        make_namespace(cluster, name)
    helm = Helm(ensure_programs(modules=(HELM,))["helm"], tmp_path, control_plane.kubeconfig)
    helm.run("upgrade", "--install", RELEASE, str(CHART), "--namespace", HOME, values={})
    cluster.kubectl("label", node, f"{OURS}=drained")
    cluster.kubectl("cordon", node)
    cluster.kubectl("taint", "node", node.removeprefix("node/"), f"{FAULT_TAINT}=true:NoExecute")
    printed: list[str] = []
    cluster.prepare(printed.append)
    assert f"namespace/{HOME}" in printed[0]
    everything = cluster.kubectl("get", "namespaces,crd,clusterroles,clusterrolebindings", "--output=name")
    assert [name for name in everything.split() if "finetune" in name] == []
    shown = cluster.kubectl("get", node, "--output=yaml")
    assert not any(text in shown for text in ("unschedulable: true", FAULT_TAINT, OURS))
    printed.clear()
    cluster.prepare(printed.append)
    assert printed == []


@pytest.mark.parametrize("name", [HOME, TEAM])
def test_existing_namespaces_of_others_are_refused(cluster: UserCluster, name: str) -> None:
    cluster.kubectl("create", "namespace", name)
    with pytest.raises(RefusedError, match=f"namespace/{name}: these exist in the cluster"):
        cluster.prepare(discard)
    cluster.kubectl("delete", "namespace", name)


def test_an_existing_crd_of_others_is_refused(cluster: UserCluster) -> None:
    """Removing the CRD would remove the jobs of others."""
    cluster.kubectl("create", "--filename", str(CHART / "files/crd.yaml"))
    with pytest.raises(RefusedError, match=CRD):
        cluster.prepare(discard)
    cluster.kubectl("delete", CRD)
