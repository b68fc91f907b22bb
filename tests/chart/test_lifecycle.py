"""Install, run, upgrade and uninstall the chart: jobs continue, and no object is left behind.

kwok simulates the kubelets, so the pods of the operator run no program. The test starts the operator itself, with the
command line and the service account of the chart.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from testing.controlplane.api import ControlPlaneApiError
from testing.controlplane.process import LOOPBACK, free_ports, wait_for
from testing.controlplane.server import ControlPlane, KubectlError
from testing.helm import CHART, HOME, NAME, RELEASE, Helm, HelmError, Values, operator_args
from testing.operator.harness import Jobs, OperatorProcess, build_job, running

LISTED = "pods,services,endpointslices,configmaps,secrets,leases,deployments,replicasets,poddisruptionbudgets"
NAMESPACED = f"{LISTED},networkpolicies,roles,rolebindings,serviceaccounts,persistentvolumeclaims"


@pytest.fixture
def nodes(control_plane: ControlPlane) -> None:
    """Add nodes for the pods of the chart."""
    control_plane.add_nodes(2, prefix="chart")


@pytest.fixture
def release(cluster_helm: Helm, nodes: None) -> Iterator[Helm]:
    """Install the chart; uninstall it at the end unless the test did."""
    install(cluster_helm)
    yield cluster_helm
    if RELEASE in cluster_helm.run("list", "--short", "--namespace", HOME):
        cluster_helm.run("uninstall", RELEASE, "--namespace", HOME, "--wait")


def install(helm: Helm, values: Values | None = None, chart: Path = CHART) -> None:
    command = ("upgrade", "--install", RELEASE, str(chart), "--namespace", HOME)
    helm.run(*command, "--wait", "--timeout", "90s", values=values or {})


class ChartOperator(OperatorProcess):
    """The operator with the flags of the Deployment, except for addresses, lease, log format and kubeconfig."""

    args: tuple[str, ...] = ()

    def _flags(self) -> list[str]:
        replaced = {
            "--kubeconfig": str(self.kubeconfig),
            "--probe-host": LOOPBACK,
            "--probe-port": str(self.probe_port),
            "--coordinator-host": LOOPBACK,
            "--coordinator-port": str(self.coordinator_port),
            "--log-format": "text",
            "--lease-seconds": "3",
            "--pod-ip": "10.0.0.1",
        }
        given = [flag for flag in self.args if flag.split("=")[0] not in replaced]
        return given + [f"{name}={value}" for name, value in replaced.items()]


def operator_of(helm: Helm, control_plane: ControlPlane, log: Path, values: dict[str, Any]) -> ChartOperator:
    command, *flags = operator_args(helm.render(values))
    assert command == "run"
    operator = ChartOperator(control_plane.kubeconfig_for(NAME, HOME), log)
    operator.probe_port, operator.coordinator_port = free_ports(2)
    operator.args = tuple(flags)
    return operator


def leftovers(control_plane: ControlPlane, namespace: str) -> set[str]:
    """Return the objects in a namespace, without those that Kubernetes itself creates."""
    listed = control_plane.kubectl("get", NAMESPACED, "--namespace", namespace, "--output=name").split()
    return set(listed) - {"configmap/kube-root-ca.crt", "serviceaccount/default"}


def wait_until_empty(control_plane: ControlPlane, namespace: str) -> None:
    try:
        wait_for("nothing is left", lambda: not leftovers(control_plane, namespace), 60)
    except TimeoutError:
        pytest.fail(f"left in {namespace}: {leftovers(control_plane, namespace)}")


def test_jobs_continue_through_upgrade_and_uninstall(
    release: Helm, control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> None:
    jobs = Jobs(control_plane, namespace)
    with running(operator_of(release, control_plane, tmp_path / "old.log", {})) as operator:
        jobs.create(build_job("circles"))
        wait_for("the pods of the job run", lambda: len(running_pods(jobs)) == 2)
        metrics = operator.metrics()
        # The operator reports passes, and none of them failed.
        assert any(name.startswith("finetune_reconcile_seconds_count") and value for name, value in metrics.items())
        assert not any(name.startswith("finetune_reconcile_errors_total") and value for name, value in metrics.items())
        slices = control_plane.kubectl("get", "endpointslices", "--namespace", HOME, "--output=name")
        assert f"{NAME}-coordinator" in slices
    before = running_pods(jobs)

    # The upgrade changes the values and the Deployment. CRD, Secret and jobs stay.
    authority = secret(control_plane)
    values: dict[str, Any] = {"logs": {"level": "debug"}, "flags": {"progress-seconds": 1}, "replicas": 1}
    install(release, values)
    assert secret(control_plane) == authority
    with running(operator_of(release, control_plane, tmp_path / "new.log", values)):
        jobs.create(build_job("squares"))
        wait_for("the pods of the new job run", lambda: len(running_pods(jobs)) == 4)
        assert before.items() <= running_pods(jobs).items()
        assert jobs.status("circles")["attempt"] == 1

    # A replica without the Secret says what to do, and continues when it is done.
    control_plane.api.delete(f"/api/v1/namespaces/{HOME}/secrets/{NAME}-tls")
    operator = operator_of(release, control_plane, tmp_path / "without-secret.log", values)
    try:
        operator.start()
        wait_for("the missing Secret is reported", lambda: "run `helm upgrade`" in operator.log.read_text(), 60)
        assert f"the Secret {HOME}/{NAME}-tls with the coordinator's certificate does not exist" in (
            operator.log.read_text()
        )
        assert operator.get("/readyz")[0] == 503
        install(release, values)
        operator.wait_ready()
        assert secret(control_plane) != authority
        assert "Traceback" not in operator.log.read_text()
    finally:
        operator.kill()

    # Without the chart, the CRD and the jobs stay, and the pods continue.
    release.run("uninstall", RELEASE, "--namespace", HOME, "--wait")
    wait_until_empty(control_plane, HOME)
    assert NAME not in control_plane.kubectl("get", "clusterroles,clusterrolebindings", "--output=name")
    assert before.items() <= running_pods(jobs).items()
    # No finalizer waits for the uninstalled operator.
    for name in ("circles", "squares"):
        jobs.delete(name)
    wait_until_empty(control_plane, namespace)
    with pytest.raises(ControlPlaneApiError):
        jobs.get("circles")

    # The chart can be installed again over the CRD that was kept.
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
def test_an_upgrade_updates_the_crd(cluster_helm: Helm, control_plane: ControlPlane, tmp_path: Path) -> None:
    """`helm upgrade` of a release with an older CRD installs the new one."""
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


def test_uninstall_without_keep_removes_the_crd_and_all_jobs(
    release: Helm, control_plane: ControlPlane, namespace: str
) -> None:
    jobs = Jobs(control_plane, namespace)
    jobs.create(build_job("circles"))
    fail_helm_test(release, control_plane)
    install(release, {"crds": {"keep": False}})
    release.run("uninstall", RELEASE, "--namespace", HOME, "--wait")
    wait_for(
        "the CRD is deleted", lambda: "finetunejobs" not in control_plane.kubectl("get", "crd", "--output=name"), 60
    )
    wait_until_empty(control_plane, HOME)


def fail_helm_test(release: Helm, control_plane: ControlPlane) -> None:
    """Let the pod of `helm test` fail; Helm deletes it, because `helm uninstall` would not."""
    home, pod = Jobs(control_plane, HOME), f"{NAME}-test"
    with ThreadPoolExecutor(1) as thread:
        running_test = thread.submit(release.run, "test", RELEASE, "--namespace", HOME, "--timeout", "60s")
        wait_for("the pod of the test exists", lambda: pod in home.pods())
        home.set_pod_status(pod, {"phase": "Failed"})
        with pytest.raises(HelmError):
            running_test.result()
    assert pod not in home.pods()


@pytest.mark.usefixtures("nodes")
def test_a_second_release_manages_other_namespaces(
    cluster_helm: Helm, control_plane: ControlPlane, namespace: str
) -> None:
    """The values of docs/install.md: it needs `crds.install=false`, and each release has its own namespaces."""
    home = control_plane.create_namespace(f"second-{namespace}")
    command = ("upgrade", "--install", "second", str(CHART), "--namespace", home)
    cluster_helm.run(
        "upgrade", "--install", RELEASE, str(CHART), "--namespace", HOME, values={"namespaces": [namespace]}
    )
    with pytest.raises(HelmError, match="CustomResourceDefinition"):
        cluster_helm.run(*command, values={"namespaces": [home]})
    second = {"namespaces": [home], "crds": {"install": False}, "warnOtherNamespaces": False}
    notes = cluster_helm.run(*command, values=second)
    assert "Unless another release does" in notes
    # The CRD belongs to the first release; both may read the jobs of their own namespaces only.
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/finetunejobs.finetune-operator.io"
    assert control_plane.api.get(path)["metadata"]["annotations"]["meta.helm.sh/release-name"] == RELEASE
    allowed = {
        (account, where): can_list_jobs(control_plane, account, where)
        for account in (f"{HOME}:{NAME}", f"{home}:second-finetune-operator")
        for where in (namespace, home)
    }
    assert [own for own, may in allowed.items() if may] == [
        (f"{HOME}:{NAME}", namespace),
        (f"{home}:second-finetune-operator", home),
    ]
    # The first release warns about a job that nobody manages.
    wait_for("a warning", lambda: "does not manage this namespace" in create_warning(control_plane, "default"), 60)
    assert f"it manages {namespace}" in create_warning(control_plane, "default")
    assert create_warning(control_plane, namespace) == ""
    cluster_helm.run("uninstall", "second", "--namespace", home, "--wait")
    assert control_plane.api.get(path)["metadata"]["annotations"]["meta.helm.sh/release-name"] == RELEASE
    wait_until_empty(control_plane, home)
    cluster_helm.run("uninstall", RELEASE, "--namespace", HOME, "--wait")


def can_list_jobs(control_plane: ControlPlane, account: str, namespace: str) -> bool:
    command = ("auth", "can-i", "list", "finetunejobs.finetune-operator.io", f"--namespace={namespace}")
    try:
        return control_plane.kubectl(*command, f"--as=system:serviceaccount:{account}").strip() == "yes"
    except KubectlError:
        return False


def create_warning(control_plane: ControlPlane, namespace: str) -> str:
    """Return the warnings of the API server about a new job."""
    command = [
        str(control_plane.kubectl_path),
        "create",
        "--dry-run=server",
        f"--namespace={namespace}",
        "--filename=-",
    ]
    environment = {**os.environ, "KUBECONFIG": str(control_plane.kubeconfig)}
    job = yaml.safe_dump(build_job("circles"))
    return subprocess.run(command, env=environment, input=job, capture_output=True, text=True, check=True).stderr
