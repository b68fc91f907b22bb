"""`make cluster-test`: the chart and a job on real nodes, and everything that may happen to them.

Prints a table and, as its last line, JSON: {"faults", "wrong", "median_recovery_seconds"}. With KUBECONFIG set it runs
against that cluster instead, without the faults that need its machines; `user_cluster` says what it asks for.
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
from testing.realnodes.builder import LIGHT, OPERATOR, WHOLE
from testing.realnodes.cluster import RealCluster, in_own_network
from testing.realnodes.faults import FAULTS, SHORT
from testing.realnodes.janitor import Janitor, folder_of
from testing.realnodes.job import LONG_STEPS, SHORT_STEPS, Bed
from testing.realnodes.names import FAULT_TAINT
from testing.realnodes.prepare import NUM_NODES, prepare, tell
from testing.realnodes.run import Run, report
from testing.realnodes.runtime import MissingError
from testing.realnodes.store import ClaimStore, FolderStore
from testing.realnodes.user_cluster import RefusedError, UserCluster, image_from

FLAGS = {"progress-seconds": 0.5, "lease-seconds": 5, "beat-seconds": 1, "failure-backoff-seconds": 1}


def values(operator: str, trainer: str) -> dict[str, Any]:
    """The chart's values for these images."""
    repository, _, tag = operator.rpartition(":")
    return {
        "image": {"repository": repository, "tag": tag},
        "trainer": {"images": {"cpu": trainer, "gpu": trainer}},
        # The operator is to outlast what the faults do to pods of no priority.
        "priorityClassName": "system-cluster-critical",
        "flags": FLAGS,
        "tolerations": [{"key": FAULT_TAINT, "operator": "Exists"}],
    }


def run(chosen: list[str], folder: Path, trainer: str, long_steps: int) -> int:
    """Everything, on nodes of this machine; returns the exit code."""
    images = prepare(trainer)
    operator = images / "operator.tar"
    wrong = list(archive.faults(operator, "operator"))
    tell(
        f"the operator's image: {archive.size_mib(operator):.0f} MiB unpacked; {'; '.join(wrong) or 'as it should be'}"
    )
    helm = ensure_programs(modules=(HELM,))["helm"]
    in_own_network()
    started = time.monotonic()
    with RealCluster(NUM_NODES, folder, images, tell) as cluster:
        cluster.start_nodes()
        tell(f"{NUM_NODES} nodes are ready after {time.monotonic() - started:.0f} s")
        bed = Bed(cluster, FolderStore(folder / "shared", lends_packages=trainer == LIGHT))
        one = Run(
            cluster, Helm(helm, folder / "helm", cluster.kubeconfig), bed, values(OPERATOR, trainer), tell, long_steps
        )
        one.begin()
        return report(one, chosen, wrong)


def run_elsewhere(kubeconfig: Path, chosen: list[str], folder: Path, long_steps: int) -> int:
    """The same on a cluster of the user's; returns the exit code."""
    operator, trainer = image_from("FINETUNE_OPERATOR_IMAGE"), image_from("FINETUNE_TRAINER_IMAGE")
    skipped = [name for name in chosen if FAULTS[name].own_machines]
    if skipped:
        tell(f"SKIPPED, for they need the machines of the nodes: {', '.join(skipped)}")
    programs = ensure_programs(modules=(*ALL_MODULES, HELM))
    cluster = UserCluster(programs["kubectl"], kubeconfig)
    cluster.begin(tell)
    store = ClaimStore(trainer, os.environ.get("FINETUNE_STORAGE_CLASS"), folder / "shared")
    helm = Helm(programs["helm"], folder / "helm", kubeconfig)
    one = Run(cluster, helm, Bed(cluster, store), values(operator, trainer), tell, long_steps)
    try:
        one.begin()
        return report(one, [name for name in chosen if name not in skipped], [])
    finally:
        cluster.remove_all(tell)


def main() -> int:
    """Parse, run, clean up."""
    parser = argparse.ArgumentParser(prog="python -m testing.realnodes", description=__doc__)
    parser.add_argument("--faults", default="", help="some of them, by commas: " + ", ".join(FAULTS))
    parser.add_argument("--short", action="store_true", help="only " + ", ".join(SHORT))
    parser.add_argument("--keep", action="store_true", help="keep logs and volumes")
    parser.add_argument(
        "--trainer-image", action="store_true", help="train from images/trainer-cpu.Dockerfile, torch and all"
    )
    options = parser.parse_args()
    names = [name.strip() for name in options.faults.split(",") if name.strip()]
    chosen = names or (list(SHORT) if options.short else list(FAULTS))
    if unknown := [name for name in chosen if name not in FAULTS]:
        parser.error(f"unknown: {', '.join(unknown)}; there are: {', '.join(FAULTS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    folder = folder_of(os.getpid())
    kubeconfig = os.environ.get("KUBECONFIG")
    try:
        with Janitor(keep=options.keep):
            long_steps = SHORT_STEPS if options.short else LONG_STEPS
            if kubeconfig:
                return run_elsewhere(Path(kubeconfig), chosen, folder, long_steps)
            return run(chosen, folder, WHOLE if options.trainer_image else LIGHT, long_steps)
    except MissingError as error:
        print(f"SKIPPED: {error}", file=sys.stderr)
        return 0
    except (BuildError, RefusedError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
