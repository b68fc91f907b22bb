"""Forks ranks from one process that has imported torch and diffusers: a restart saves the seconds of those imports.

Started by the supervisor as `python -m finetune_trainer.supervisor.fork_server FD`, FD being a listening socket; see
`forks` for the other side. One connection is one rank: an order and three descriptors come in; the pid goes out, then
the exit code. A connection that is closed early ends its rank.

It ends with its supervisor. With `--shared`, it serves several, and lives until its standard input is closed and its
last rank has ended: so ranks outlive whoever started the server.

Forking is safe only while there is one thread, no OpenMP pool and no CUDA context. Where the imports have made one of
these, the server ends, and the ranks are started without it.
"""

from __future__ import annotations

import array
import ctypes
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import struct
import sys
import tempfile
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from finetune_contract import environment
from finetune_contract.fork_socket import SHARED
from finetune_trainer import libraries

HEADER_BYTES = 8
"""Length of an order, big-endian, before the order itself (JSON)."""
NUM_DESCRIPTORS = 3
"""stdout, stderr and the pipe for reports."""
UNSAFE = 3
"""Exit code where forking would not be safe."""
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Client:
    """One rank: the connection of who asked for it, and its process."""

    connection: socket.socket
    pid: int = 0
    descriptor: int = -1
    """pidfd of the process."""


class Server:
    """Takes orders until it is ended."""

    def __init__(self, listening: socket.socket, owner: IO[bytes] | None = None) -> None:
        self._listening = listening
        self._selector = selectors.DefaultSelector()
        self._selector.register(listening, selectors.EVENT_READ)
        self._owner = owner
        self._is_wanted = True
        if owner is not None:
            self._selector.register(owner, selectors.EVENT_READ)
        self._clients: list[Client] = []

    def serve(self) -> None:
        """Serve for ever, or until the owner has gone and no rank is left."""
        while self._is_wanted or self._clients:
            for key, _ in self._selector.select():
                if key.fileobj is self._listening:
                    self._take_order(self._listening.accept()[0])
                elif key.fileobj is self._owner:
                    self._is_wanted = False
                    self._selector.unregister(self._owner)
                elif key.data in self._clients:
                    self._see(key.data, key.fileobj)

    def _take_order(self, connection: socket.socket) -> None:
        client = Client(connection)
        try:
            check_peer(connection)
            order, descriptors = receive_order(connection)
        except (OSError, ValueError):
            connection.close()
            return
        server = os.getpid()
        client.pid = os.fork()
        if client.pid == 0:
            self._close_all(connection)
            become_rank(order, descriptors, server)
        for descriptor in descriptors:
            os.close(descriptor)
        client.descriptor = os.pidfd_open(client.pid)
        self._clients.append(client)
        self._selector.register(client.descriptor, selectors.EVENT_READ, client)
        self._selector.register(connection, selectors.EVENT_READ, client)
        _tell(client, {"pid": client.pid})

    def _see(self, client: Client, source: Any) -> None:
        if source is client.connection:
            # Whoever asked has gone, or no longer wants it: the rank goes, too, and its end is seen below.
            self._selector.unregister(client.connection)
            os.kill(client.pid, signal.SIGKILL)
            return
        _, status = os.waitpid(client.pid, 0)
        _tell(client, {"exit": os.waitstatus_to_exitcode(status)})
        self._selector.unregister(client.descriptor)
        with suppress(KeyError):
            self._selector.unregister(client.connection)
        os.close(client.descriptor)
        client.connection.close()
        self._clients.remove(client)

    def _close_all(self, connection: socket.socket) -> None:
        """In the child: a copy of another rank's connection would hide that its supervisor has gone."""
        self._selector.close()
        self._listening.close()
        connection.close()
        for client in self._clients:
            client.connection.close()
            os.close(client.descriptor)


def check_peer(connection: socket.socket) -> None:
    """Take orders of this very user only: a socket without a file has no permissions of its own.

    Raises:
        PermissionError: it is somebody else.
    """
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if user != os.getuid():
        raise PermissionError(f"user {user} has no orders to give here")


def receive_order(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Read one order and its descriptors.

    Raises:
        OSError: the connection broke.
        ValueError: it is none.
    """
    space = socket.CMSG_SPACE(NUM_DESCRIPTORS * array.array("i").itemsize)
    data, ancillary, _, _ = connection.recvmsg(2**16, space)
    descriptors = array.array("i")
    for _, kind, value in ancillary:
        if kind == socket.SCM_RIGHTS:
            descriptors.frombytes(value)
    while len(data) < HEADER_BYTES or len(data) < HEADER_BYTES + int.from_bytes(data[:HEADER_BYTES]):
        more = connection.recv(2**16)
        if not more:
            raise ConnectionResetError
        data += more
    if len(descriptors) != NUM_DESCRIPTORS:
        raise ValueError("an order comes with three descriptors")
    return json.loads(data[HEADER_BYTES:]), list(descriptors)


def become_rank(order: dict[str, Any], descriptors: list[int], server: int) -> None:
    """In the child: take the place of a process that was started with the order's command. Does not return."""
    code = 1
    try:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != server:
            os._exit(128 + signal.SIGKILL)
        stdout, stderr, report = descriptors
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        _set_environment({**order["environment"], environment.REPORT_FD: str(report)})
        if order["cores"] is not None:
            os.sched_setaffinity(0, order["cores"])
        sys.argv = [order["module"], *order["arguments"]]
        runpy.run_module(order["module"], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _set_environment(env: dict[str, str]) -> None:
    """Set variables, and what was read from them while the libraries were imported."""
    import torch  # noqa: PLC0415  imported long ago

    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None
    if threads := env.get("OMP_NUM_THREADS", ""):
        torch.set_num_threads(int(threads))
    _libc.prctl(_PR_SET_NAME, f"rank {env.get('RANK', '')}".encode(), 0, 0, 0)


def is_safe() -> bool:
    """Whether a fork takes nothing along that only its parent may use: threads, or what opens the GPUs."""
    opened = []
    for path in Path("/proc/self/fd").iterdir():
        # One of them is the look itself, and gone by now.
        with suppress(FileNotFoundError):
            opened.append(str(path.readlink()))
    return not any(name.startswith("/dev/nvidia") for name in opened) and len(os.listdir("/proc/self/task")) == 1  # noqa: PTH208  a count


def _tell(client: Client, news: dict[str, int]) -> None:
    # Whoever is gone needs no news.
    with suppress(OSError):
        client.connection.sendall(json.dumps(news).encode() + b"\n")


def main() -> None:
    """Import, then serve."""
    shared = SHARED in sys.argv
    if not shared:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    listening = socket.socket(fileno=int(sys.argv[1]))
    gc.disable()
    libraries.prepare(os.environ)
    libraries.preload()
    if not is_safe():
        sys.exit(UNSAFE)
    gc.freeze()
    Server(listening, sys.stdin.buffer if shared else None).serve()


if __name__ == "__main__":
    main()
