"""Install, run, upgrade, uninstall: jobs live through it, and nothing is left behind.

kwok plays the kubelets, so the operator's pods do not really run: the test runs the operator's program in their place,
with the command line and the service account of the chart.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from testing.controlplane.api import ControlPlaneApiError
from testing.controlplane.process import LOOPBACK, free_ports, wait_for
from testing.controlplane.server import ControlPlane
from testing.helm import CHART, HOME, NAME, RELEASE, Helm, Values, operator_args
from testing.operator.harness import Jobs, OperatorProcess, build_job, running

LISTED = "pods,services,endpointslices,configmaps,secrets,leases,deployments,replicasets,poddisruptionbudgets"
NAMESPACED = f"{LISTED},networkpolicies,roles,rolebindings,serviceaccounts,persistentvolumeclaims"


@pytest.fixture
def nodes(control_plane: ControlPlane) -> None:
    """Where the chart's pods run."""
    control_plane.add_nodes(2, prefix="chart")


@pytest.fixture
def release(cluster_helm: Helm, nodes: None) -> Iterator[Helm]:
    """The chart, installed; uninstalled at the end where the test has not done it."""
    install(cluster_helm)
    yield cluster_helm
    if RELEASE in cluster_helm.run("list", "--short", "--namespace", HOME):
        cluster_helm.run("uninstall", RELEASE, "--namespace", HOME, "--wait")


def install(helm: Helm, values: Values | None = None, chart: Path = CHART) -> None:
    command = ("upgrade", "--install", RELEASE, str(chart), "--namespace", HOME)
    helm.run(*command, "--wait", "--timeout", "90s", values=values or {})


class ChartOperator(OperatorProcess):
    """The operator as the Deployment starts it, but for addresses and the kubeconfig."""

    args: tuple[str, ...] = ()

    def _flags(self) -> list[str]:
        ours = {
            "--kubeconfig": str(self.kubeconfig),
            "--probe-host": LOOPBACK,
            "--probe-port": str(self.probe_port),
            "--coordinator-host": LOOPBACK,
            "--coordinator-port": str(self.coordinator_port),
            "--log-format": "text",
            "--lease-seconds": "3",
            "--pod-ip": "10.0.0.1",
        }
        given = [flag for flag in self.args if flag.split("=")[0] not in ours]
        return given + [f"{name}={value}" for name, value in ours.items()]


def operator_of(helm: Helm, control_plane: ControlPlane, log: Path, values: dict[str, Any]) -> ChartOperator:
    command, *flags = operator_args(helm.render(values))
    assert command == "run"
    operator = ChartOperator(control_plane.kubeconfig_for(NAME, HOME), log)
    operator.probe_port, operator.coordinator_port = free_ports(2)
    operator.args = tuple(flags)
    return operator


def left(control_plane: ControlPlane, namespace: str) -> set[str]:
    """What is in a namespace, but for what Kubernetes itself puts there."""
    listed = control_plane.kubectl("get", NAMESPACED, "--namespace", namespace, "--output=name").split()
    return set(listed) - {"configmap/kube-root-ca.crt", "serviceaccount/default"}


def wait_until_empty(control_plane: ControlPlane, namespace: str) -> None:
    try:
        wait_for("nothing is left", lambda: not left(control_plane, namespace), 60)
    except TimeoutError:
        pytest.fail(f"left in {namespace}: {left(control_plane, namespace)}")


def test_from_install_to_uninstall(release: Helm, control_plane: ControlPlane, namespace: str, tmp_path: Path) -> None:
    jobs = Jobs(control_plane, namespace)
    with running(operator_of(release, control_plane, tmp_path / "old.log", {})) as operator:
        jobs.create(build_job("circles"))
        wait_for("its pods run", lambda: len(running_pods(jobs)) == 2)
        assert not any("reconcile_errors_total" in name and value for name, value in operator.metrics().items())
        slices = control_plane.kubectl("get", "endpointslices", "--namespace", HOME, "--output=name")
        assert f"{NAME}-coordinator" in slices
    before = running_pods(jobs)

    # An upgrade: other values, another Deployment, the same CRD, Secret and jobs.
    authority = secret(control_plane)
    values: dict[str, Any] = {"logs": {"level": "debug"}, "flags": {"progress-seconds": 1}, "replicas": 1}
    install(release, values)
    assert secret(control_plane) == authority
    with running(operator_of(release, control_plane, tmp_path / "new.log", values)):
        jobs.create(build_job("squares"))
        wait_for("new jobs are taken", lambda: len(running_pods(jobs)) == 4)
        assert before.items() <= running_pods(jobs).items()
        assert jobs.status("circles")["attempt"] == 1

    # Without the chart, jobs go on unseen; the CRD and they stay.
    release.run("uninstall", RELEASE, "--namespace", HOME, "--wait")
    wait_until_empty(control_plane, HOME)
    assert NAME not in control_plane.kubectl("get", "clusterroles,clusterrolebindings", "--output=name")
    assert before.items() <= running_pods(jobs).items()
    # No finalizer waits for an operator that is gone.
    for name in ("circles", "squares"):
        jobs.delete(name)
    wait_until_empty(control_plane, namespace)
    with pytest.raises(ControlPlaneApiError):
        jobs.get("circles")

    # And back again, over the CRD that was kept.
    install(release)
    assert "finetunejobs" in control_plane.kubectl("get", "crd", "--output=name")


def running_pods(jobs: Jobs) -> dict[str, str]:
    return {
        name: pod["metadata"]["uid"] for name, pod in jobs.pods().items() if pod["status"].get("phase") == "Running"
    }


def secret(control_plane: ControlPlane) -> dict[str, str]:
    data: dict[str, str] = control_plane.api.get(f"/api/v1/namespaces/{HOME}/secrets/{NAME}-tls")["data"]
    assert {"ca.crt", "tls.crt", "tls.key"} <= data.keys()
    return data


@pytest.mark.usefixtures("nodes")
def test_an_upgrade_brings_the_new_crd(cluster_helm: Helm, control_plane: ControlPlane, tmp_path: Path) -> None:
    """A release of an older chart gets the new fields by `helm upgrade` alone, and jobs keep what is in them."""
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/finetunejobs.finetune-operator.io"
    old = tmp_path / "finetune-operator"
    shutil.copytree(CHART, old)
    definition = yaml.safe_load((old / "files/crd.yaml").read_text())
    del definition["spec"]["versions"][0]["additionalPrinterColumns"]
    (old / "files/crd.yaml").write_text(yaml.safe_dump(definition, sort_keys=False))
    install(cluster_helm, chart=old)
    assert "additionalPrinterColumns" not in control_plane.api.get(path)["spec"]["versions"][0]
    install(cluster_helm)
    assert control_plane.api.get(path)["spec"]["versions"][0]["additionalPrinterColumns"]
    cluster_helm.run("uninstall", RELEASE, "--namespace", HOME, "--wait")


def test_without_keep_the_crd_and_all_jobs_go(release: Helm, control_plane: ControlPlane, namespace: str) -> None:
    jobs = Jobs(control_plane, namespace)
    jobs.create(build_job("circles"))
    install(release, {"crds": {"keep": False}})
    release.run("uninstall", RELEASE, "--namespace", HOME, "--wait")
    wait_for("the CRD is gone", lambda: "finetunejobs" not in control_plane.kubectl("get", "crd", "--output=name"), 60)
