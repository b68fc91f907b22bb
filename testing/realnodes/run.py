"""One run on one cluster: reference jobs without faults, one job per fault, uninstallation, and a table of results."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from testing.controlplane.process import wait_for
from testing.controlplane.server import KubectlError
from testing.helm import CHART, Helm, HelmError
from testing.realnodes import security
from testing.realnodes.faults import FAULTS, FaultTarget
from testing.realnodes.job import FAULT_STEP, LONG_STEPS, SCRIPT_WORK, STEPS, JobsHarness, Work, make_namespace
from testing.realnodes.names import CLUSTER_KINDS, CRD, HOME, OF_CHART, RELEASE, TEAM
from testing.realnodes.store import KubectlCluster, Object

KINDS = "pods,services,configmaps,secrets,leases,endpointslices,persistentvolumeclaims"
EXPECTED_LEFT = ("configmap/kube-root-ca.crt", "pod/carrier")
"""Objects that Kubernetes and the test itself create in a namespace."""

PrintLine = Callable[[str], None]


@dataclass
class FaultResult:
    """The result of one fault."""

    name: str
    cause: str
    seconds: float
    wrong: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        return "; ".join(self.wrong) or "correct"


@dataclass
class ClusterRun:
    """All checks on one cluster, from the installation of the chart to its removal."""

    cluster: KubectlCluster
    helm: Helm
    harness: JobsHarness
    values: dict[str, Any]
    print_line: PrintLine
    long_steps: int = LONG_STEPS
    upgrades: int = 0
    weights: dict[Work, str] = field(default_factory=dict)
    """Hash of the weights of each reference job."""

    def install(self, *more: str, **changes: Any) -> None:
        """Install or upgrade the chart."""
        command = ("upgrade", "--install", RELEASE, str(CHART), "--namespace", HOME)
        self.helm.run(*command, *more, values={**self.values, **changes})

    def set_up(self) -> None:
        """Install the chart, run its test, and create the volume of the jobs."""
        make_namespace(self.cluster, HOME)
        self.install("--wait", "--timeout", "100s")
        self.print_line("the chart is installed")
        printed = self.helm.run("test", RELEASE, "--namespace", HOME, "--logs")
        self.print_line("helm test: " + "; ".join(line for line in printed.splitlines() if line.startswith("ok:")))
        self.harness.prepare()

    def upgrade(self) -> None:
        """Change the Deployment, which replaces all replicas. Do not wait for the rollout."""
        self.upgrades += 1
        self.install(podAnnotations={"upgrade": str(self.upgrades)})

    @property
    def long_work(self) -> Work:
        """Return the work of a job that trains longer than the operator is unavailable."""
        return Work(self.long_steps)

    def train_reference(self, *, with_script: bool) -> list[str]:
        """Train the reference jobs; return the defects found inside their pods. The nodes have space for two jobs."""
        jobs = {"undisturbed": Work(STEPS), "undisturbed-long": self.long_work}
        for name, work in jobs.items():
            self.harness.create(name, work)
        # The short job may have ended before the pods of the long one are checked.
        neighbour = self.harness.wait_pods("undisturbed")[0]
        self.harness.wait_step("undisturbed-long", 1)
        wrong = self._check_inside("undisturbed-long", neighbour)
        for name, work in jobs.items():
            self._finish_reference(name, work)
        if with_script:
            self.harness.create("undisturbed-script", SCRIPT_WORK)
            self._finish_reference("undisturbed-script", SCRIPT_WORK)
        return wrong

    def _finish_reference(self, name: str, work: Work) -> None:
        """Wait until a reference job has succeeded, and store the hash of its weights."""
        status = self.harness.wait_end(name)
        assert status["phase"] == "Succeeded", json.dumps(status, indent=1)
        assert status["attempt"] == 1, json.dumps(status["attempts"], indent=1)
        self.weights[work] = self.harness.weights(name)

    def inject(self, name: str) -> FaultResult:
        """Run one job and inject one fault while it trains."""
        fault, job = FAULTS[name], f"fault-{list(FAULTS).index(name)}"
        undo: Callable[[], None] = lambda: None  # noqa: E731
        ordinary = SCRIPT_WORK if fault.on_script else Work(STEPS)
        work = ordinary if fault.causes else self.long_work
        try:
            self.harness.create(job, work)
            before = self.harness.wait_step(job, FAULT_STEP)
            leader, injected_at = self.harness.leader(), time.time()
            undo = fault.inject(FaultTarget(self.cluster, self.harness, job, self.upgrade))
            if fault.causes:
                stepped = self.harness.wait_next_attempt(job, before["attempt"])
            else:
                stepped = self.harness.wait_new_leader(job, leader)
            result = self._evaluate(name, work, job, stepped - injected_at)
        except (AssertionError, TimeoutError, KubectlError, HelmError) as error:
            result = FaultResult(name, "?", float("inf"), [str(error)])
        finally:
            undo()
        if result.wrong:
            self.print_line(f"{name}: {result.verdict}\n{self.harness.describe(job)}")
        return result

    def _evaluate(self, name: str, work: Work, job: str, seconds: float) -> FaultResult:
        fault = FAULTS[name]
        status = self.harness.wait_end(job)
        wrong = []
        if status["phase"] != "Succeeded":
            wrong.append(f"the job ended {status['phase']}: {status.get('message')}")
        elif self.harness.weights(job) != self.weights[work]:
            wrong.append("its weights differ from those of the reference job")
        causes = [entry["reason"] for entry in status["attempts"] if entry.get("reason") not in (None, "Finished")]
        if fault.causes and (not causes or not set(causes) <= fault.causes):
            wrong.append(f"the ledger contains {causes}, expected {sorted(fault.causes)}")
        if not fault.causes and status["attempt"] != 1:
            wrong.append(f"attempts ended although no pod of the job was affected: {causes}")
        return FaultResult(name, ", ".join(causes) or "-", seconds, wrong)

    def _check_inside(self, job: str, neighbour: Object) -> list[str]:
        own, peer = self.harness.pods(job)
        found = security.check_inside(self.cluster, own["metadata"]["name"], neighbour, peer)
        return list(security.find_differences(found))

    def uninstall(self) -> list[str]:
        """Uninstall the chart while a job trains, then delete the jobs and the CRD; return the defects found."""
        wrong = []
        self.harness.create("last", self.long_work)
        self.harness.wait_step("last", 1)
        self.helm.run("uninstall", RELEASE, "--namespace", HOME, "--wait")
        of_job = "--selector=finetune-operator.io/job=last"
        trained = ("wait", "--for=jsonpath={.status.phase}=Succeeded", "pods", of_job, "--timeout=200s")
        self._kubectl("--namespace", TEAM, *trained)
        if self.harness.weights("last") != self.weights[self.long_work]:
            wrong.append("a job without an operator ended with different weights")
        self._kubectl("--namespace", TEAM, "delete", "ftj", "--all", "--timeout=90s")
        try:
            wait_for("nothing is left", lambda: not self._find_leftovers(), 60, 1)
        except TimeoutError:
            wrong.append(f"left behind: {self._find_leftovers()}")
        # A finalizer of the operator would block these.
        self._kubectl("delete", CRD, "--timeout=60s")
        self._kubectl("delete", "namespace", TEAM, HOME, "--timeout=90s")
        return wrong

    def _find_leftovers(self) -> list[str]:
        left = self._kubectl("get", KINDS, "--namespace", HOME, "--output=name").split()
        of_jobs = self._kubectl("get", KINDS, "--namespace", TEAM, "--output=name").split()
        left += [thing for thing in of_jobs if not thing.startswith("persistentvolumeclaim/")]
        left += self._kubectl("get", CLUSTER_KINDS, f"--selector={OF_CHART}", "--output=name").split()
        return [thing for thing in left if thing not in EXPECTED_LEFT]

    def _kubectl(self, *arguments: str) -> str:
        return self.cluster.kubectl(*arguments, timeout_seconds=220)


def run_and_report(one: ClusterRun, chosen: list[str], wrong: list[str]) -> int:
    """Run the jobs, print the table and the JSON line; return the exit code."""
    started = time.monotonic()
    inside = one.train_reference(with_script=any(FAULTS[name].on_script for name in chosen))
    seconds = time.monotonic() - started
    one.print_line(f"reference jobs: {seconds:.0f} s; checks inside a pod: {'; '.join(inside) or 'correct'}")
    results = []
    for name in chosen:
        result = one.inject(name)
        one.print_line(f"{name}: {result.seconds:.1f} s, {result.cause}: {result.verdict}")
        results.append(result)
    left = one.uninstall()
    one.print_line(f"uninstalled while a job ran: {'; '.join(left) or 'it trained to the end, and nothing is left'}")
    wrong = [*wrong, *inside, *left]
    print(f"\n  {'fault':30} {'to the next step':>16}  {'cause in the ledger':44} verdict")
    for result in results:
        print(f"  {result.name:30} {result.seconds:>14.1f} s  {result.cause:44} {result.verdict}")
    for message in wrong:
        print(f"  wrong: {message}")
    num_wrong = len(wrong) + sum(bool(result.wrong) for result in results)
    finite = [result.seconds for result in results if math.isfinite(result.seconds)]
    median = round(statistics.median(finite), 1) if finite else None
    print(json.dumps({"faults": len(results), "wrong": num_wrong, "median_recovery_seconds": median}))
    return 1 if num_wrong else 0
