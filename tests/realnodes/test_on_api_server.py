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
    """A separate control plane without the CRD, because the names are those of a run."""
    components = {"kube-controller-manager", "kwok"}
    with ControlPlane(components, folder=tmp_path_factory.mktemp("realnodes-control-plane")) as running:
        yield running


@pytest.fixture
def cluster(control_plane: ControlPlane) -> UserCluster:
    """Return the control plane as a cluster of the user."""
    return UserCluster(control_plane.kubectl_path, control_plane.kubeconfig)


def say(_: str) -> None:
    """Discard progress messages."""


@pytest.mark.skipif(os.geteuid() != 0, reason="volumes belong to the user of the jobs, which needs root")
def test_a_claim_always_gets_a_volume(control_plane: ControlPlane, cluster: UserCluster, tmp_path: Path) -> None:
    make_namespace(cluster, TEAM)
    volumes = Volumes(control_plane.api, tmp_path)
    volumes.begin()
    claims = f"/api/v1/namespaces/{TEAM}/persistentvolumeclaims"
    seen: set[str] = set()

    def is_bound(name: str) -> bool:
        volumes.maintain()
        claim = control_plane.api.get(f"{claims}/{name}")
        if phase(claim) == "Bound":
            seen.add(claim["spec"]["volumeName"])
        return phase(claim) == "Bound"

    for name in ("a", "b", "c"):
        store.apply(cluster, store.claim(name, storage_class=None))
        wait_for(f"{name} is bound", functools.partial(is_bound, name), SECONDS)
    assert len(seen) == 3
    assert all((tmp_path / name).stat().st_uid == store.USER for name in seen)
    cluster.kubectl("delete", "namespace", TEAM)

    def no_volume_is_left() -> bool:
        volumes.maintain()
        left = {volume["metadata"]["name"] for volume in control_plane.api.get(VOLUMES)["items"]}
        return not seen & left and not any((tmp_path / name).exists() for name in seen)

    wait_for("their volumes are removed", no_volume_is_left, SECONDS)


def test_leftovers_of_a_killed_run_are_removed(
    control_plane: ControlPlane, cluster: UserCluster, tmp_path: Path
) -> None:
    control_plane.add_nodes(1, prefix="left")
    (node,) = cluster.kubectl("get", "nodes", "--output=name").split()
    cluster.begin(say)
    for name in (HOME, TEAM):
        make_namespace(cluster, name)
    helm = Helm(ensure_programs(modules=(HELM,))["helm"], tmp_path, control_plane.kubeconfig)
    helm.run("upgrade", "--install", RELEASE, str(CHART), "--namespace", HOME, values={})
    cluster.kubectl("label", node, f"{OURS}=drained")
    cluster.kubectl("cordon", node)
    cluster.kubectl("taint", "node", node.removeprefix("node/"), f"{FAULT_TAINT}=true:NoExecute")
    said: list[str] = []
    cluster.begin(said.append)
    assert f"namespace/{HOME}" in said[0]
    everything = cluster.kubectl("get", "namespaces,crd,clusterroles,clusterrolebindings", "--output=name")
    assert [name for name in everything.split() if "finetune" in name] == []
    shown = cluster.kubectl("get", node, "--output=yaml")
    assert not any(word in shown for word in ("unschedulable: true", FAULT_TAINT, OURS))
    said.clear()
    cluster.begin(said.append)
    assert said == []


@pytest.mark.parametrize("name", [HOME, TEAM])
def test_objects_of_others_are_not_touched(cluster: UserCluster, name: str) -> None:
    cluster.kubectl("create", "namespace", name)
    with pytest.raises(RefusedError, match=f"namespace/{name}: these exist in the cluster"):
        cluster.begin(say)
    cluster.kubectl("delete", "namespace", name)


def test_jobs_of_others_are_not_touched(cluster: UserCluster) -> None:
    """Removing the CRD would remove their jobs."""
    cluster.kubectl("create", "--filename", str(CHART / "files/crd.yaml"))
    with pytest.raises(RefusedError, match=CRD):
        cluster.begin(say)
    cluster.kubectl("delete", CRD)
