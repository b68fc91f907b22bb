"""`make cluster`: run real nodes on this machine until Ctrl-C, for manual use or as a cluster for `make cluster-test`.

Prints the shell commands that set the kubeconfig and the variables that `make cluster-test` needs for a user cluster.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

from testing.controlplane import commands
from testing.controlplane.api import ControlPlaneApiError
from testing.controlplane.build import HELM, BuildError, ensure_programs
from testing.realnodes.builder import FULL, OPERATOR
from testing.realnodes.cleanup import CleanupProcess, folder_of
from testing.realnodes.cluster import RealCluster, enter_own_network
from testing.realnodes.forwarder import PortForwarder
from testing.realnodes.prepare import NUM_NODES, prepare, print_progress
from testing.realnodes.runtime import MissingError
from testing.realnodes.volumes import Volumes

POLL_SECONDS = 1.0
INSTRUCTIONS = """
export KUBECONFIG={kubeconfig}
export FINETUNE_OPERATOR_IMAGE={operator} FINETUNE_TRAINER_IMAGE={trainer}
alias kubectl={kubectl} helm={helm}

helm install finetune-operator charts/finetune-operator -n finetune-system --create-namespace --wait \\
  --set image.repository={repository},image.tag={tag},trainer.images.cpu={trainer},trainer.images.gpu={trainer} \\
  --set trainer.images.cpuIntel={trainer} --set trainer.images.export={trainer}

The default storage class binds claims. Ctrl-C stops the cluster."""


def run(folder: Path) -> int:
    """Start the cluster, print the instructions, wait until a program ends; return the exit code."""
    images = prepare(FULL)
    helm = ensure_programs(modules=(HELM,))["helm"]
    repository, _, tag = OPERATOR.rpartition(":")
    forwarder = PortForwarder()
    enter_own_network()
    with RealCluster(NUM_NODES, folder, images, print_progress) as cluster:
        cluster.start_nodes()
        volumes = Volumes(cluster.api, folder / "volumes")
        volumes.start()
        forwarder.open(cluster.api_port)
        kubeconfig = write_outside_kubeconfig(cluster, forwarder.port)
        names = {"kubeconfig": kubeconfig, "kubectl": cluster.kubectl_path, "helm": helm}
        print(INSTRUCTIONS.format(operator=OPERATOR, repository=repository, tag=tag, trainer=FULL, **names), flush=True)
        while not any(program.has_exited for program in cluster.programs):
            # The request fails if the user edits the same volume at the same time; the next iteration repeats it.
            with contextlib.suppress(ControlPlaneApiError):
                volumes.maintain()
            time.sleep(POLL_SECONDS)
        print(cluster.tails(), file=sys.stderr)
        return 1


def write_outside_kubeconfig(cluster: RealCluster, port: int) -> Path:
    """Write the kubeconfig of an administrator for the network of this machine; return its path."""
    path = cluster.kubeconfig.with_name("outside")
    client = commands.certificate_user(cluster.authority.issue("outside", groups=["system:masters"]))
    path.touch(mode=0o600)
    path.write_text(commands.kubeconfig(f"https://127.0.0.1:{port}", cluster.authority.certificate, client))
    return path


def main() -> int:
    """Run until Ctrl-C or SIGTERM, then clean up."""
    # Like Ctrl-C: stop everything that was started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with CleanupProcess():
            return run(folder_of(os.getpid()))
    except (MissingError, BuildError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped")
        return 0


if __name__ == "__main__":
    sys.exit(main())
