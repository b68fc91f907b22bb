"""`make cluster`: real nodes on this machine until Ctrl-C, for a person, or as a cluster for `make cluster-test`.

Prints what a shell needs: the kubeconfig, and the variables that `make cluster-test` asks for on a cluster of a user's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

from testing.controlplane import commands
from testing.controlplane.api import ApiError
from testing.controlplane.build import HELM, BuildError, ensure_programs
from testing.realnodes.builder import OPERATOR, WHOLE
from testing.realnodes.cluster import RealCluster, in_own_network
from testing.realnodes.door import Door
from testing.realnodes.janitor import Janitor, folder_of
from testing.realnodes.prepare import NUM_NODES, prepare, tell
from testing.realnodes.runtime import MissingError
from testing.realnodes.volumes import Volumes

LOOK_SECONDS = 1.0
WORDS = """
export KUBECONFIG={kubeconfig}
export FINETUNE_OPERATOR_IMAGE={operator} FINETUNE_TRAINER_IMAGE={trainer}
alias kubectl={kubectl} helm={helm}

helm install finetune-operator charts/finetune-operator -n finetune-system --create-namespace --wait \\
  --set image.repository={repository},image.tag={tag},trainer.images.cpu={trainer},trainer.images.gpu={trainer}

Claims are bound by the default storage class. Ctrl-C stops it."""


def run(folder: Path) -> int:
    """Start, show, and wait until one of the programs ends; returns the exit code."""
    images = prepare(WHOLE)
    helm = ensure_programs(modules=(HELM,))["helm"]
    repository, _, tag = OPERATOR.rpartition(":")
    door = Door()
    in_own_network()
    with RealCluster(NUM_NODES, folder, images, tell) as cluster:
        cluster.start_nodes()
        volumes = Volumes(cluster.api, folder / "volumes")
        volumes.begin()
        door.open(cluster.api_port)
        kubeconfig = outside(cluster, door.port)
        names = {"kubeconfig": kubeconfig, "kubectl": cluster.kubectl_path, "helm": helm}
        print(WORDS.format(operator=OPERATOR, repository=repository, tag=tag, trainer=WHOLE, **names), flush=True)
        while not any(program.died for program in cluster.programs):
            # A person may have the same volume under their hands.
            with contextlib.suppress(ApiError):
                volumes.tend()
            time.sleep(LOOK_SECONDS)
        print(cluster.tails(), file=sys.stderr)
        return 1


def outside(cluster: RealCluster, port: int) -> Path:
    """An administrator's kubeconfig for this machine's own network."""
    path = cluster.kubeconfig.with_name("outside")
    client = commands.certificate_user(cluster.authority.issue("outside", groups=["system:masters"]))
    path.touch(mode=0o600)
    path.write_text(commands.kubeconfig(f"https://127.0.0.1:{port}", cluster.authority.certificate, client))
    return path


def main() -> int:
    """Run until Ctrl-C or SIGTERM, then clean up."""
    # As with Ctrl-C, what was started is ended.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Janitor():
            return run(folder_of(os.getpid()))
    except (MissingError, BuildError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped")
        return 0


if __name__ == "__main__":
    sys.exit(main())
