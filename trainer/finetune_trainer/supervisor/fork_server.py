"""Forks ranks from one process that has imported torch and diffusers: a restart saves the seconds of those imports.

The supervisor starts it as `python -m finetune_trainer.supervisor.fork_server FD`, where FD is a listening socket; see
`forks` for the client side. One connection is one rank: the client sends an order and three descriptors; the server
sends the pid, then the exit code. If the client closes the connection early, the server kills the rank.

It exits with its supervisor. With `--shared` it serves several supervisors, and exits when its standard input is closed
and its last rank has ended: ranks then survive the process that started the server.

Forking is safe only with one thread and without CUDA; see `fork_safety`. If it is not, the server answers the orders
that have arrived with the reason and exits, and the ranks are started without it.
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
from typing import IO, Any

from finetune_contract import environment
from finetune_contract.fork_socket import SHARED
from finetune_trainer import libraries
from finetune_trainer.supervisor.fork_safety import (
    ForkState,
    ImportWatch,
    forget_devices,
    why_unsafe,
    without_cuda_driver,
)
from finetune_trainer.supervisor.log import log
from finetune_trainer.supervisor.numa import memory_binder

HEADER_BYTES = 8
"""Size of the header: the length of the order, big-endian. The order itself (JSON) follows."""
NUM_DESCRIPTORS = 3
"""stdout, stderr and the pipe for reports."""
UNSAFE = 3
"""Exit code if forking is not safe."""
ORDER_SECONDS = 5.0
"""Longest time to wait for the rest of an order that is refused."""
GROUP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that `timeout` and terminals send to the whole process group. If they ended the server, its ranks would be
killed with it, before they can save."""
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class ForkedRank:
    """One rank: the connection of the client that ordered it, and its process."""

    connection: socket.socket
    pid: int = 0
    descriptor: int = -1
    """pidfd of the process."""


class ForkServer:
    """Accepts orders and forks ranks."""

    def __init__(self, listening: socket.socket, owner: IO[bytes] | None = None) -> None:
        self._listening = listening
        self._selector = selectors.DefaultSelector()
        self._selector.register(listening, selectors.EVENT_READ)
        self._owner = owner
        self._has_owner = True
        if owner is not None:
            self._selector.register(owner, selectors.EVENT_READ)
        self._ranks: list[ForkedRank] = []

    def serve(self) -> None:
        """Serve forever, or until the owner has closed its end and no rank is left."""
        while self._has_owner or self._ranks:
            for key, _ in self._selector.select():
                if key.fileobj is self._listening:
                    self._accept_order(self._listening.accept()[0])
                elif key.fileobj is self._owner:
                    self._has_owner = False
                    self._selector.unregister(self._owner)
                elif key.data in self._ranks:
                    self._handle_event(key.data, key.fileobj)

    def _accept_order(self, connection: socket.socket) -> None:
        rank = ForkedRank(connection)
        try:
            check_peer(connection)
            order, descriptors = receive_order(connection)
        except (OSError, ValueError):
            connection.close()
            return
        server = os.getpid()
        # The child inherits that these signals are ignored. Blocked, they wait for its own handling of them.
        signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
        rank.pid = os.fork()
        if rank.pid == 0:
            self._close_all(connection)
            become_rank(order, descriptors, server)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, GROUP_SIGNALS)
        for descriptor in descriptors:
            os.close(descriptor)
        rank.descriptor = os.pidfd_open(rank.pid)
        self._ranks.append(rank)
        self._selector.register(rank.descriptor, selectors.EVENT_READ, rank)
        self._selector.register(connection, selectors.EVENT_READ, rank)
        _send(rank, {"pid": rank.pid})

    def _handle_event(self, rank: ForkedRank, source: Any) -> None:
        if source is rank.connection:
            # The client has exited or no longer needs the rank: kill it. Its exit is the next event.
            self._selector.unregister(rank.connection)
            os.kill(rank.pid, signal.SIGKILL)
            return
        _, status = os.waitpid(rank.pid, 0)
        _send(rank, {"exit": os.waitstatus_to_exitcode(status)})
        self._selector.unregister(rank.descriptor)
        with suppress(KeyError):
            self._selector.unregister(rank.connection)
        os.close(rank.descriptor)
        rank.connection.close()
        self._ranks.remove(rank)

    def _close_all(self, connection: socket.socket) -> None:
        """In the child: close the copies of the other ranks' connections, which would hide the exit of their client."""
        self._selector.close()
        self._listening.close()
        connection.close()
        for rank in self._ranks:
            rank.connection.close()
            os.close(rank.descriptor)


def check_peer(connection: socket.socket) -> None:
    """Accept orders of this user only: an abstract socket has no file permissions.

    Raises:
        PermissionError: the peer is another user.
    """
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if user != os.getuid():
        raise PermissionError(f"user {user} may not order ranks here")


def receive_order(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Read one order and its descriptors.

    Raises:
        OSError: the connection broke.
        ValueError: the message is not an order.
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
        raise ValueError(f"an order has {NUM_DESCRIPTORS} descriptors, not {len(descriptors)}")
    return json.loads(data[HEADER_BYTES:]), list(descriptors)


def become_rank(order: dict[str, Any], descriptors: list[int], server: int) -> None:
    """In the child: run the order like a process that was started with its command. Does not return."""
    code = 1
    try:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != server:
            os._exit(128 + signal.SIGKILL)
        for number in GROUP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, GROUP_SIGNALS)
        stdout, stderr, report = descriptors
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        _set_environment({**order["environment"], environment.REPORT_FD: str(report)})
        if order["cores"] is not None:
            os.sched_setaffinity(0, order["cores"])
        memory_binder(order.get("memory", ()))()
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
    """Set the environment variables, and update the settings that the imported libraries read from them."""
    import torch  # noqa: PLC0415  already imported by preload()

    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None
    forget_devices()
    if threads := env.get("OMP_NUM_THREADS", ""):
        torch.set_num_threads(int(threads))
    _libc.prctl(_PR_SET_NAME, f"rank {env.get('RANK', '')}".encode(), 0, 0, 0)


def refuse_orders(listening: socket.socket, reason: str) -> None:
    """Answer the orders that have arrived with the reason for which no rank can be forked."""
    listening.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            connection = listening.accept()[0]
            connection.settimeout(ORDER_SECONDS)
            with connection, suppress(OSError, ValueError):
                check_peer(connection)
                # A socket that is closed before its input was read discards what was sent.
                for descriptor in receive_order(connection)[1]:
                    os.close(descriptor)
                connection.sendall(json.dumps({"refused": reason}).encode() + b"\n")


def _send(rank: ForkedRank, message: dict[str, int]) -> None:
    # A client that has exited needs no message.
    with suppress(OSError):
        rank.connection.sendall(json.dumps(message).encode() + b"\n")


def main() -> None:
    """Import the libraries, then serve."""
    shared = SHARED in sys.argv
    for number in GROUP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if not shared:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    listening = socket.socket(fileno=int(sys.argv[1]))
    gc.disable()
    libraries.prepare(os.environ)
    watch = ImportWatch()
    with without_cuda_driver(watch):
        libraries.preload(watch.check)
    if (reason := why_unsafe(ForkState.of_this_process(watch))) is not None:
        log(f"the ranks are not forked: {reason}")
        refuse_orders(listening, reason)
        sys.exit(UNSAFE)
    gc.freeze()
    ForkServer(listening, sys.stdin.buffer if shared else None).serve()


if __name__ == "__main__":
    main()
