"""One fork server for all pods of a run, so that the imports of the trainer are loaded only once.

It starts with the first pod that can use it. It exits when the run is over and its last rank has ended, because pods
can outlive `finetune run`. If it cannot start, each pod's supervisor starts its ranks without it.
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
"""Time limit for the server to exit at the end of a run, if no rank is left."""


class SharedForkServer:
    """The server of one run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pid = 0
        self._address = ""
        self._stdin_end = -1
        """Write end of its standard input. The server exits after this is closed."""

    def attach(self, container: Container) -> Container:
        """Return the container with the server's address in its environment, if it runs the trainer's own ranks."""
        env = container.environment
        if container.argv != tuple(resolve_command(SUPERVISOR)) or env.get(environment.FORK_SERVER):
            return container
        address = self._ensure_running(env)
        if not address:
            return container
        changed = {**env, environment.FORK_SERVER: address}
        return Container(container.argv, changed, container.working_folder)

    def close(self) -> None:
        """End the run's use of the server, and wait briefly for the server to exit."""
        with self._lock:
            if self._stdin_end < 0:
                return
            os.close(self._stdin_end)
            self._stdin_end = -1
            deadline = time.monotonic() + END_SECONDS
            while self._is_running() and time.monotonic() < deadline:
                time.sleep(0.01)

    def _ensure_running(self, env: Mapping[str, str]) -> str:
        """Return the address of a running server, started if necessary; empty if it cannot be started."""
        with self._lock:
            if not self._is_running():
                self._address = ""
                with suppress(OSError):
                    self._start(env)
            return self._address

    def _is_running(self) -> bool:
        if not self._pid:
            return False
        with suppress(ChildProcessError):
            if os.waitpid(self._pid, os.WNOHANG) == (0, 0):
                return True
        self._pid = 0
        return False

    def _start(self, env: Mapping[str, str]) -> None:
        if self._stdin_end >= 0:
            os.close(self._stdin_end)
        stdin, self._stdin_end = os.pipe()
        # Each rank gets the environment of its own pod. The token is for supervisors only.
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
