"""One fork server for all pods of a run, as one image is on a node for all of them: imports are done once.

Started beside the first pod that can use it. It ends once the run is over and its last rank has ended: pods live on
when `finetune run` does not. Where it cannot be had, each pod's supervisor does without.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress

from finetune_contract import environment
from finetune_contract.fork_socket import SHARED, address_of, listen, server_command
from finetune_operator.cluster.local.kubelet.container import Container
from finetune_operator.cluster.local.kubelet.launch import SUPERVISOR, resolve_command

_DESCRIPTOR = 3
"""The server's listening socket, after standard input, output and error."""
END_SECONDS = 2.0
"""How long the end of a run waits for its server, where no rank is left."""


class SharedForks:
    """The server of one run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pid = 0
        self._address = ""
        self._life = -1
        """Our end of its standard input: it ends after this is closed."""

    def join(self, container: Container) -> Container:
        """Tell a container of the server, where its supervisor's ranks are the trainer's own."""
        env = container.environment
        if container.argv != tuple(resolve_command(SUPERVISOR)) or env.get(environment.FORK_SERVER):
            return container
        address = self._ready(env)
        if not address:
            return container
        changed = {**env, environment.FORK_SERVER: address}
        return Container(container.argv, changed, container.working_folder)

    def close(self) -> None:
        """The run is over."""
        with self._lock:
            if self._life < 0:
                return
            os.close(self._life)
            self._life = -1
            deadline = time.monotonic() + END_SECONDS
            while self._lives() and time.monotonic() < deadline:
                time.sleep(0.01)

    def _ready(self, env: Mapping[str, str]) -> str:
        """The address of a server that lives; empty where none can be started."""
        with self._lock:
            if not self._lives():
                self._address = ""
                with suppress(OSError):
                    self._start(env)
            return self._address

    def _lives(self) -> bool:
        if not self._pid:
            return False
        with suppress(ChildProcessError):
            if os.waitpid(self._pid, os.WNOHANG) == (0, 0):
                return True
        self._pid = 0
        return False

    def _start(self, env: Mapping[str, str]) -> None:
        if self._life >= 0:
            os.close(self._life)
        stdin, self._life = os.pipe()
        # The ranks get the environment of their own pods, and the token is for supervisors only.
        own = {name: value for name, value in env.items() if name != environment.COORDINATOR_TOKEN}
        command = (*server_command(_DESCRIPTOR), SHARED)
        try:
            with listen() as listening:
                self._pid = os.posix_spawn(
                    command[0],
                    command,
                    {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", **own, "PYTHONUNBUFFERED": "1"},
                    file_actions=[
                        (os.POSIX_SPAWN_DUP2, stdin, 0),
                        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                        (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
                        (os.POSIX_SPAWN_DUP2, listening.fileno(), _DESCRIPTOR),
                    ],
                    setsid=True,
                )
                self._address = address_of(listening)
        finally:
            os.close(stdin)
