"""Client of the fork server: a forked rank with the interface of a process that asyncio has started."""

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
from typing import Any

from finetune_contract import environment
from finetune_contract.cpu.placement import RankPlace
from finetune_contract.fork_socket import address_of, listen, raw_address, server_command
from finetune_trainer.supervisor.fork_server import HEADER_BYTES


class NotForkedError(Exception):
    """The server exited before the fork: start the rank without it.

    The text is the reason for which it cannot fork; it is empty if the server was ended.
    """


class ForkClient:
    """Client of one fork server: that of this supervisor, or one that several share (FINETUNE_FORK_SERVER)."""

    def __init__(self, address: str, process: Process | None) -> None:
        self.address = address
        self._process = process
        self.refusal = ""
        """Why the server cannot fork; empty if it can, as far as this client knows."""

    @property
    def pid(self) -> int | None:
        """Process id of the supervisor's own server; None for a shared one."""
        return self._process.pid if self._process is not None else None

    @classmethod
    async def connect(cls, env: Mapping[str, str], prepare: Callable[[], None]) -> ForkClient:
        """Use the server that the environment names, or start one. It accepts orders while it still imports.

        Args:
            env: environment of a server that is started here.
            prepare: called between fork and exec of that server.

        Raises:
            OSError: the process cannot be started.
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

    async def fork(self, module: Sequence[str], env: Mapping[str, str], place: RankPlace) -> ForkedProcess:
        """Order a rank.

        Args:
            module: name of the module to run as `python -m` does, and its arguments.
            env: environment of the rank; the descriptor of the report pipe in it is passed on.
            place: CPUs and memory of the rank.

        Raises:
            OSError: no server answers.
        """
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(raw_address(self.address))
            order = {
                "module": module[0],
                "arguments": list(module[1:]),
                "environment": dict(env),
                "cores": sorted(place.compute) or None,
                "memory": list(place.memory),
            }
            return await ForkedProcess.order(connection, json.dumps(order).encode(), int(env[environment.REPORT_FD]))
        except BaseException:
            connection.close()
            raise


class ForkedProcess:
    """One forked rank. Its pid is 0 until the server has forked it; SIGTERM and SIGKILL cancel it until then."""

    def __init__(self, replies: asyncio.StreamReader, transport: asyncio.StreamWriter) -> None:
        self._replies = replies
        self._transport = transport
        self._descriptor = -1
        self.pid = 0
        self.returncode: int | None = None
        self.stdout = asyncio.StreamReader(limit=2**20)
        self.stderr = asyncio.StreamReader(limit=2**20)

    @classmethod
    async def order(cls, connection: socket.socket, order: bytes, report_fd: int) -> ForkedProcess:
        """Send an order with the descriptors of the rank.

        Raises:
            OSError: the server has exited.
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

    async def wait_until_forked(self) -> None:
        """Wait until the rank runs or was cancelled.

        Raises:
            NotForkedError: the server exited before the fork.
        """
        line = await self._read_message()
        if self.returncode is None and "pid" not in line:
            raise NotForkedError(line.get("refused", ""))
        if self.returncode is None:
            self.pid = line["pid"]
            with suppress(ProcessLookupError):
                self._descriptor = os.pidfd_open(self.pid)

    async def wait(self) -> int:
        """Wait for the end of the rank. Return its exit code, or minus the number of the signal that ended it."""
        if self.returncode is None:
            line = await self._read_message()
            # The kernel kills the ranks of a server that has exited.
            self.returncode = int(line.get("exit", -signal.SIGKILL))
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self._transport.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to this process, never to another one that got the same pid."""
        if self._descriptor >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, number)
        elif not self.pid and number in (signal.SIGTERM, signal.SIGKILL) and self.returncode is None:
            self.returncode = -number
            self._transport.close()
            self._replies.feed_eof()

    async def _read_message(self) -> dict[str, Any]:
        try:
            line = await self._replies.readline()
        except ConnectionError:
            line = b""
        message: dict[str, Any] = json.loads(line) if line.endswith(b"\n") else {}
        return message


def module_of(command: Sequence[str]) -> Sequence[str] | None:
    """Return the module and its arguments if the command is `python -m MODULE` with this Python, otherwise None."""
    return command[2:] if tuple(command[:2]) == (sys.executable, "-m") else None


async def _read_into(stream: asyncio.StreamReader, descriptor: int) -> None:
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(descriptor, "rb", buffering=0)
    )
