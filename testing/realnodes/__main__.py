"""`make cluster-test`: install the chart on real nodes, train, and inject faults during training.

Prints a table and, as its last line, JSON: {"faults", "wrong", "median_recovery_seconds"}. With KUBECONFIG set it uses
that cluster instead and skips the faults that need access to its machines; `user_cluster` lists the requirements.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from testing.controlplane.build import ALL_MODULES, HELM, BuildError, ensure_programs
from testing.helm import Helm
from testing.realnodes import archive
from testing.realnodes.builder import FULL, LIGHT, OPERATOR
from testing.realnodes.cleanup import CleanupProcess, folder_of
from testing.realnodes.cluster import RealCluster, enter_own_network
from testing.realnodes.faults import FAULTS, SHORT
from testing.realnodes.job import LONG_STEPS, SHORT_STEPS, JobsHarness
from testing.realnodes.names import FAULT_TAINT
from testing.realnodes.prepare import NUM_NODES, prepare, print_progress
from testing.realnodes.run import ClusterRun, run_and_report
from testing.realnodes.runtime import MissingError
from testing.realnodes.store import ClaimStore, FolderVolume
from testing.realnodes.user_cluster import RefusedError, UserCluster, image_from

FLAGS = {"progress-seconds": 0.5, "lease-seconds": 5, "beat-seconds": 1, "failure-backoff-seconds": 1}


def values(operator: str, trainer: str) -> dict[str, Any]:
    """Return the chart values for these images."""
    repository, _, tag = operator.rpartition(":")
    return {
        "image": {"repository": repository, "tag": tag},
        "trainer": {"images": {"cpu": trainer, "cpuIntel": trainer, "gpu": trainer, "export": trainer}},
        # The faults evict pods without priority; the operator must not be one of them.
        "priorityClassName": "system-cluster-critical",
        "flags": FLAGS,
        "tolerations": [{"key": FAULT_TAINT, "operator": "Exists"}],
    }


def run(chosen: list[str], folder: Path, trainer: str, long_steps: int) -> int:
    """Run all checks on real nodes of this machine; return the exit code."""
    images = prepare(trainer)
    operator = images / "operator.tar"
    wrong = list(archive.find_defects(operator, "operator"))
    print_progress(f"operator image: {archive.size_mib(operator):.0f} MiB unpacked; {'; '.join(wrong) or 'correct'}")
    helm = ensure_programs(modules=(HELM,))["helm"]
    enter_own_network()
    started = time.monotonic()
    with RealCluster(NUM_NODES, folder, images, print_progress) as cluster:
        cluster.start_nodes()
        print_progress(f"{NUM_NODES} nodes became ready after {time.monotonic() - started:.0f} s")
        harness = JobsHarness(cluster, FolderVolume(folder / "shared", mounts_packages=trainer == LIGHT))
        one = ClusterRun(
            cluster,
            Helm(helm, folder / "helm", cluster.kubeconfig),
            harness,
            values(OPERATOR, trainer),
            print_progress,
            long_steps,
        )
        one.set_up()
        return run_and_report(one, chosen, wrong)


def run_on_user_cluster(kubeconfig: Path, chosen: list[str], folder: Path, long_steps: int) -> int:
    """Run all checks on the cluster of the user; return the exit code."""
    operator, trainer = image_from("FINETUNE_OPERATOR_IMAGE"), image_from("FINETUNE_TRAINER_IMAGE")
    skipped = [name for name in chosen if FAULTS[name].needs_machines]
    if skipped:
        print_progress(f"SKIPPED, because they need access to the machines of the nodes: {', '.join(skipped)}")
    programs = ensure_programs(modules=(*ALL_MODULES, HELM))
    cluster = UserCluster(programs["kubectl"], kubeconfig)
    cluster.prepare(print_progress)
    store = ClaimStore(trainer, os.environ.get("FINETUNE_STORAGE_CLASS"), folder / "shared")
    helm = Helm(programs["helm"], folder / "helm", kubeconfig)
    one = ClusterRun(cluster, helm, JobsHarness(cluster, store), values(operator, trainer), print_progress, long_steps)
    try:
        one.set_up()
        return run_and_report(one, [name for name in chosen if name not in skipped], [])
    finally:
        cluster.remove_all(print_progress)


def main() -> int:
    """Parse the options, run the checks and clean up; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m testing.realnodes", description=__doc__)
    parser.add_argument("--faults", default="", help="only these, separated by commas: " + ", ".join(FAULTS))
    parser.add_argument("--short", action="store_true", help="only " + ", ".join(SHORT))
    parser.add_argument("--keep", action="store_true", help="keep logs and volumes")
    parser.add_argument(
        "--trainer-image",
        action="store_true",
        help="use the image of images/trainer-cpu.Dockerfile, which contains torch",
    )
    options = parser.parse_args()
    names = [name.strip() for name in options.faults.split(",") if name.strip()]
    chosen = names or (list(SHORT) if options.short else list(FAULTS))
    if unknown := [name for name in chosen if name not in FAULTS]:
        parser.error(f"unknown: {', '.join(unknown)}; use one of: {', '.join(FAULTS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    folder = folder_of(os.getpid())
    kubeconfig = os.environ.get("KUBECONFIG")
    try:
        with CleanupProcess(keep=options.keep):
            long_steps = SHORT_STEPS if options.short else LONG_STEPS
            if kubeconfig:
                return run_on_user_cluster(Path(kubeconfig), chosen, folder, long_steps)
            return run(chosen, folder, FULL if options.trainer_image else LIGHT, long_steps)
    except MissingError as error:
        print(f"SKIPPED: {error}", file=sys.stderr)
        return 0
    except (BuildError, RefusedError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
