"""The supervisor's side of the fork server: a process of a rank that looks like one started by asyncio."""

from __future__ import annotations

import array
import asyncio
import json
import os
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from finetune_contract import environment
from finetune_contract.fork_socket import address_of, listen, raw_address, server_command
from finetune_trainer.supervisor.fork_server import HEADER_BYTES


class NotForkedError(Exception):
    """The server ended before it had forked: the rank is to be started without it."""


class ForkServer:
    """Where ranks are forked: a process of this supervisor's own, or one that several share (FINETUNE_FORK_SERVER)."""

    def __init__(self, address: str, process: Process | None) -> None:
        self.address = address
        self._process = process

    @property
    def pid(self) -> int | None:
        """Process id of the supervisor's own server."""
        return self._process.pid if self._process is not None else None

    @classmethod
    async def find(cls, env: Mapping[str, str], prepare: Callable[[], None]) -> ForkServer:
        """Use the one that the environment names, or start one. Ranks may be asked for while it still imports.

        Args:
            env: environment of a server that is started.
            prepare: called in it between fork and exec.

        Raises:
            OSError: no process can be started.
        """
        if shared := env.get(environment.FORK_SERVER):
            return cls(shared, None)
        with listen() as listening:
            process = await asyncio.create_subprocess_exec(
                *server_command(listening.fileno()),
                env={"OPENBLAS_NUM_THREADS": "1", **env, "PYTHONUNBUFFERED": "1"},
                stdin=DEVNULL,
                pass_fds=(listening.fileno(),),
                preexec_fn=prepare,
            )
            return cls(address_of(listening), process)

    async def fork(self, module: Sequence[str], env: Mapping[str, str], cores: frozenset[int] | None) -> ForkedProcess:
        """Ask for a rank.

        Args:
            module: name of a module to run as `python -m` would, and its arguments.
            env: environment of the rank; the report's descriptor in it is passed on.
            cores: cores to pin it to.

        Raises:
            OSError: there is no server.
        """
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(raw_address(self.address))
            order = {
                "module": module[0],
                "arguments": list(module[1:]),
                "environment": dict(env),
                "cores": None if cores is None else sorted(cores),
            }
            return await ForkedProcess.ask(connection, json.dumps(order).encode(), int(env[environment.REPORT_FD]))
        except BaseException:
            connection.close()
            raise


class ForkedProcess:
    """One forked rank. Until the server has forked it, its pid is 0, and a signal that would end it does."""

    def __init__(self, replies: asyncio.StreamReader, transport: asyncio.StreamWriter) -> None:
        self._replies = replies
        self._transport = transport
        self._descriptor = -1
        self.pid = 0
        self.returncode: int | None = None
        self.stdout = asyncio.StreamReader(limit=2**20)
        self.stderr = asyncio.StreamReader(limit=2**20)

    @classmethod
    async def ask(cls, connection: socket.socket, order: bytes, report_fd: int) -> ForkedProcess:
        """Send an order with the descriptors that the rank is to have.

        Raises:
            OSError: the server is gone.
        """
        outputs, inputs = zip(os.pipe(), os.pipe(), strict=True)
        descriptors = array.array("i", [*inputs, report_fd])
        try:
            message = len(order).to_bytes(HEADER_BYTES) + order
            sent = connection.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
            connection.sendall(message[sent:])
        finally:
            for descriptor in inputs:
                os.close(descriptor)
        process = cls(*await asyncio.open_unix_connection(sock=connection))
        for descriptor, stream in zip(outputs, (process.stdout, process.stderr), strict=True):
            await _read_into(stream, descriptor)
        return process

    async def begun(self) -> None:
        """Wait until it runs, or has been ended before that.

        Raises:
            NotForkedError: the server ended first.
        """
        line = await self._line()
        if self.returncode is None and "pid" not in line:
            raise NotForkedError
        if self.returncode is None:
            self.pid = line["pid"]
            with suppress(ProcessLookupError):
                self._descriptor = os.pidfd_open(self.pid)

    async def wait(self) -> int:
        """Wait for its end; return its exit code, minus the number of the signal that ended it."""
        if self.returncode is None:
            line = await self._line()
            # A server that dies takes its ranks along.
            self.returncode = line.get("exit", -signal.SIGKILL)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self._transport.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to exactly this process."""
        if self._descriptor >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, number)
        elif not self.pid and number in (signal.SIGTERM, signal.SIGKILL) and self.returncode is None:
            self.returncode = -number
            self._transport.close()
            self._replies.feed_eof()

    async def _line(self) -> dict[str, int]:
        try:
            line = await self._replies.readline()
        except ConnectionError:
            line = b""
        news: dict[str, int] = json.loads(line) if line.endswith(b"\n") else {}
        return news


def module_of(command: Sequence[str]) -> Sequence[str] | None:
    """The module, and its arguments, that a command runs with this very Python; None where it is another command."""
    return command[2:] if tuple(command[:2]) == (sys.executable, "-m") else None


async def _read_into(stream: asyncio.StreamReader, descriptor: int) -> None:
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(descriptor, "rb", buffering=0)
    )
