"""`make cluster-test`: the chart and a job on real nodes, and everything that may happen to them.

Prints a table and, as its last line, JSON: {"faults", "wrong", "median_recovery_seconds"}. With KUBECONFIG set it runs
against that cluster instead, without the faults that need its machines; `user_cluster` says what it asks for.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chart.helm import CHART, HOME, RELEASE, Helm
from tests.controlplane.build import ALL_MODULES, HELM, ensure_programs
from tests.realnodes import archive, security
from tests.realnodes.builder import OPERATOR, TRAINER, Builder
from tests.realnodes.cluster import RealCluster, in_own_network, work_folder
from tests.realnodes.faults import FAULTS, Fault, Scene
from tests.realnodes.job import FAULT_STEP, Bed
from tests.realnodes.programs import ensure_all
from tests.realnodes.runtime import MissingError, check_machine, ensure_runtime
from tests.realnodes.store import TEAM, ClaimStore, Cluster, FolderStore
from tests.realnodes.user_cluster import UserCluster, image_from

NUM_NODES = 3
VALUES: dict[str, Any] = {
    "image": {"repository": OPERATOR.split(":")[0], "tag": OPERATOR.split(":")[1], "pullPolicy": "Never"},
    "trainer": {"images": {"cpu": TRAINER, "gpu": TRAINER}},
    # The operator is to outlast what the faults do to pods of no priority.
    "priorityClassName": "system-cluster-critical",
    "flags": {"progress-seconds": 0.5, "lease-seconds": 5, "beat-seconds": 1, "failure-backoff-seconds": 1},
    "tolerations": [{"key": "finetune.test/termination", "operator": "Exists"}],
}


@dataclass
class Result:
    """What one fault came to."""

    name: str
    cause: str
    seconds: float
    wrong: list[str] = field(default_factory=list)


@dataclass
class Run:
    """One cluster, from the chart's installation to its end."""

    cluster: Cluster
    helm: Helm
    bed: Bed
    values: dict[str, Any]
    upgrades: int = 0

    def install(self, *more: str, **changes: Any) -> None:
        """Install or upgrade the chart."""
        command = ("upgrade", "--install", RELEASE, str(CHART), "--namespace", HOME, "--create-namespace")
        self.helm.run(*command, *more, values={**self.values, **changes})

    def upgrade(self) -> None:
        """Another Deployment: all replicas are replaced, and nobody waits for that."""
        self.upgrades += 1
        self.install(podAnnotations={"upgrade": str(self.upgrades)})

    def undisturbed(self) -> tuple[str, float, list[str]]:
        """The weights that every other run must end with; the seconds; and what is wrong in the pods."""
        started = time.monotonic()
        self.bed.create("undisturbed")
        self.bed.create("neighbour")
        self.bed.wait_step("undisturbed", 1)
        wrong = self._look_inside()
        self.cluster.kubectl("--namespace", TEAM, "delete", "ftj", "neighbour", "--wait=false")
        status = self.bed.wait_end("undisturbed")
        assert status["phase"] == "Succeeded", json.dumps(status, indent=1)
        assert status["attempt"] == 1, json.dumps(status["attempts"], indent=1)
        return self.bed.weights("undisturbed"), time.monotonic() - started, wrong

    def suffer(self, name: str, fault: Fault, weights: str) -> Result:
        """One job, one fault in its middle."""
        job = f"fault-{list(FAULTS).index(name)}"
        self.bed.create(job)
        before = self.bed.wait_step(job, FAULT_STEP)
        struck = time.monotonic()
        undo = fault.strike(Scene(self.cluster, self.bed, job, self.upgrade))
        stepped = self.bed.wait_next_attempt(job, before["attempt"]) if fault.causes else self.bed.wait_news(job)
        status = self.bed.wait_end(job)
        undo()
        return Result(name, *self._judge(job, fault, status, stepped - struck, weights))

    def _judge(
        self, job: str, fault: Fault, status: dict[str, Any], seconds: float, weights: str
    ) -> tuple[str, float, list[str]]:
        wrong = []
        if status["phase"] != "Succeeded":
            wrong.append(f"it ended {status['phase']}: {status.get('message')}")
        elif self.bed.weights(job) != weights:
            wrong.append("its weights are not those of the undisturbed run")
        causes = [entry["reason"] for entry in status["attempts"] if entry.get("reason") not in (None, "Finished")]
        if fault.causes and not fault.causes & set(causes):
            wrong.append(f"the ledger says {causes}, none of {sorted(fault.causes)}")
        if not fault.causes and status["attempt"] != 1:
            wrong.append(f"attempts ended, though no pod of it was touched: {causes}")
        return ", ".join(causes) or "-", seconds, wrong

    def _look_inside(self) -> list[str]:
        pod = self.bed.pods("undisturbed")[0]["metadata"]["name"]
        neighbour = self.bed.pods("neighbour")[0]
        owner = neighbour["metadata"]["ownerReferences"][0]
        other = {"job": owner["name"], "job_uid": owner["uid"]}
        other |= {"pod": neighbour["metadata"]["name"], "uid": neighbour["metadata"]["uid"]}
        return list(security.differences(security.look_inside(self.cluster, pod, other)))

    def uninstall(self) -> list[str]:
        """Uninstall, delete the jobs; what is left then."""
        self.helm.run("uninstall", RELEASE, "--namespace", HOME, "--wait")
        self.cluster.kubectl("--namespace", TEAM, "delete", "ftj", "--all", "--timeout=90s", timeout_seconds=100)
        listed = "pods,services,configmaps,secrets,leases,endpointslices"
        of_jobs = "--selector=finetune-operator.io/job"
        self.cluster.kubectl(
            "--namespace", TEAM, "wait", "--for=delete", "pods", of_jobs, "--timeout=90s", timeout_seconds=100
        )
        left = self.cluster.kubectl("get", listed, "--namespace", TEAM, "--output=name").split()
        left += self.cluster.kubectl("get", listed, "--namespace", HOME, "--output=name").split()
        return [thing for thing in left if thing not in ("configmap/kube-root-ca.crt", "pod/carrier")]


def run(chosen: list[str], folder: Path) -> int:
    """Everything; returns the exit code."""
    say = tell
    check_machine()
    # These need the machine's network.
    ensure_all(say)
    ensure_runtime(say)
    operator = Builder(say).ensure() / "operator.tar"
    wrong = list(archive.operator_faults(operator))
    say(f"the operator's image: {archive.size_mib(operator):.0f} MiB unpacked; {'; '.join(wrong) or 'as it should be'}")
    helm = ensure_programs(modules=(HELM,))["helm"]
    in_own_network()
    started = time.monotonic()
    cluster = RealCluster(NUM_NODES, folder, say)
    with cluster:
        cluster.start_nodes()
        say(f"{NUM_NODES} nodes are ready after {time.monotonic() - started:.0f} s")
        bed = Bed(cluster, FolderStore(folder / "shared"))
        one = Run(cluster, Helm(helm, folder / "helm", cluster.kubeconfig), bed, VALUES)
        one.install("--wait", "--timeout", "100s")
        say("the chart is installed")
        say(" ".join(one.helm.run("test", RELEASE, "--namespace", HOME, "--logs").split("\n")[-4:]))
        one.bed.prepare()
        return report(one, chosen, wrong, say)


def run_elsewhere(kubeconfig: Path, chosen: list[str], folder: Path) -> int:
    """The same on a cluster of the user's; returns the exit code."""
    operator, trainer = image_from("FINETUNE_OPERATOR_IMAGE"), image_from("FINETUNE_TRAINER_IMAGE")
    skipped = [name for name in chosen if FAULTS[name].own_machines]
    if skipped:
        tell(f"SKIPPED, for they need the machines of the nodes: {', '.join(skipped)}")
    programs = ensure_programs(modules=(*ALL_MODULES, HELM))
    cluster = UserCluster(programs["kubectl"], kubeconfig)
    repository, _, tag = operator.rpartition(":")
    values = {
        **VALUES,
        "image": {"repository": repository, "tag": tag},
        "trainer": {"images": {"cpu": trainer, "gpu": trainer}},
    }
    store = ClaimStore(trainer, os.environ.get("FINETUNE_STORAGE_CLASS"), folder / "shared")
    one = Run(cluster, Helm(programs["helm"], folder / "helm", kubeconfig), Bed(cluster, store), values)
    one.install("--wait", "--timeout", "100s")
    try:
        one.bed.prepare()
        return report(one, [name for name in chosen if name not in skipped], [], tell)
    finally:
        cluster.kubectl("delete", "namespace", TEAM, "--wait=false")


def report(one: Run, chosen: list[str], wrong: list[str], say: Callable[[str], None]) -> int:
    """Run the jobs, print the table and the last line."""
    weights, seconds, inside = one.undisturbed()
    say(f"undisturbed: {seconds:.0f} s; from inside a pod: {'; '.join(inside) or 'nothing that it must not'}")
    wrong = wrong + inside
    results = []
    for name in chosen:
        result = one.suffer(name, FAULTS[name], weights)
        say(f"{name}: {result.seconds:.1f} s, {result.cause} {'; '.join(result.wrong) or 'right'}")
        results.append(result)
    left = one.uninstall()
    if left:
        wrong.append(f"left behind: {left}")
    print(f"\n  {'fault':26} {'to the next step':>16}  {'the ledger says':44} verdict")
    for result in results:
        print(f"  {result.name:26} {result.seconds:>14.1f} s  {result.cause:44} {'; '.join(result.wrong) or 'right'}")
    for sentence in wrong:
        print(f"  wrong: {sentence}")
    num_wrong = len(wrong) + sum(bool(result.wrong) for result in results)
    median = round(statistics.median(result.seconds for result in results), 1)
    print(json.dumps({"faults": len(results), "wrong": num_wrong, "median_recovery_seconds": median}))
    return 1 if num_wrong else 0


def tell(line: str) -> None:
    """Progress, at once."""
    print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)


def main() -> int:
    """Parse, run, clean up."""
    parser = argparse.ArgumentParser(prog="python -m tests.realnodes", description=__doc__)
    parser.add_argument("--faults", default="", help="some of them, by commas: " + ", ".join(FAULTS))
    parser.add_argument("--keep", action="store_true", help="keep logs and volumes")
    options = parser.parse_args()
    chosen = [name.strip() for name in options.faults.split(",") if name.strip()] or list(FAULTS)
    if unknown := [name for name in chosen if name not in FAULTS]:
        parser.error(f"unknown: {', '.join(unknown)}; there are: {', '.join(FAULTS)}")
    folder = work_folder()
    try:
        kubeconfig = os.environ.get("KUBECONFIG")
        return run_elsewhere(Path(kubeconfig), chosen, folder) if kubeconfig else run(chosen, folder)
    except MissingError as error:
        print(f"SKIPPED: {error}", file=sys.stderr)
        return 0
    finally:
        if options.keep:
            print(f"kept: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
