"""The rank processes of a supervisor: environment, pipes and end."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from finetune_contract import environment
from finetune_contract.cpu.placement import RankPlace
from finetune_contract.cpu.variables import thread_variables
from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import MAX_LAST_OUTPUT, NOT_FORKED, RankEnd, RankReport, RankState, first_error
from finetune_trainer.supervisor.config import Config
from finetune_trainer.supervisor.forks import ForkClient, ForkedProcess, NotForkedError, module_of
from finetune_trainer.supervisor.log import log
from finetune_trainer.supervisor.memory import describe_oom_kill, memory_limit, num_oom_kills
from finetune_trainer.supervisor.numa import memory_binder

LAST_LINES = 40
"""Lines of stderr that are kept for the termination message."""
DRAIN_SECONDS = 1.0
"""Time to read the rest of the pipes after a rank has ended."""
WITHOUT_STATE = frozenset({RankState.STARTING, RankState.LOADING, RankState.CACHING, RankState.RESTORING})
"""States in which a rank has nothing to save."""
OF_PROGRAM = frozenset(range(1, 256)) - (set(ExitCode) - {ExitCode.SOFTWARE})
"""Exit codes of ranks that memory could have ended: the other codes of the contract have their own cause."""
AnyProcess = Process | ForkedProcess
_PR_SET_PDEATHSIG = 1
_LINE_END = re.compile(rb"[\r\n]+")
_libc = ctypes.CDLL(None, use_errno=True)


class RankProcess:
    """One rank: its process and its newest report."""

    def __init__(self, rank: int, process: AnyProcess, start: RankStart, report_fd: int) -> None:
        self.rank = rank
        self.report = RankReport(rank=rank, state=RankState.STARTING)
        self.end: RankEnd | None = None
        self.lost_peer = False
        """Whether the coordinator reported a lost peer while this rank ran."""
        self._was_terminated = False
        """Whether this supervisor has sent it SIGTERM."""
        self._was_killed = False
        """Whether this supervisor has sent it SIGKILL."""
        self._num_oom_kills = num_oom_kills()
        self._process = process
        self._start = start
        self._report_fd = report_fd
        self._stderr: deque[str] = deque(maxlen=LAST_LINES)
        self._has_reported = False
        self._collected: list[str] | None = None
        self._line_collected = asyncio.Event()
        """Set by every collected line."""

    @property
    def pid(self) -> int:
        """Process id of the rank."""
        return self._process.pid

    def signal(self, number: int) -> None:
        """Send a signal, unless the process has ended. SIGUSR1 is sent only once the rank has a handler for it."""
        if number == signal.SIGUSR1 and not self._has_reported:
            return
        if self.end is None and self._process.returncode is None:
            self._was_terminated = self._was_terminated or number == signal.SIGTERM
            self._was_killed = self._was_killed or number == signal.SIGKILL
            send_signal(self._process, number)

    async def follow(self) -> RankEnd:
        """Relay output and reports until the rank has ended; return its end."""
        await self._wait_until_started()
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        readers = [
            asyncio.create_task(self._relay(self._process.stdout, sys.stdout, None)),
            asyncio.create_task(self._relay(self._process.stderr, sys.stderr, self._stderr)),
            asyncio.create_task(self._read_reports()),
        ]
        code = await self._process.wait()
        # Read the pipes to the end, unless a child of the rank survives it and keeps them open.
        _, unfinished = await asyncio.wait(readers, timeout=DRAIN_SECONDS)
        for reader in unfinished:
            reader.cancel()
        code = code if code >= 0 else 128 - code
        code = true_exit_code(code, self.report.state, was_terminated=self._was_terminated)
        if not self._was_killed and code in OF_PROGRAM and num_oom_kills() > self._num_oom_kills:
            self._stderr.append(describe_oom_kill(memory_limit()))
        last_output = "\n".join(self._stderr)[-MAX_LAST_OUTPUT:]
        self.end = RankEnd(rank=self.rank, exit_code=code, last_words=last_output)
        self._start.on_change()
        return self.end

    async def _wait_until_started(self) -> None:
        """Wait for the fork. If the fork server ended before it, start the rank by its command."""
        if isinstance(self._process, ForkedProcess):
            try:
                await self._process.wait_until_forked()
            except NotForkedError as error:
                log("starting the ranks without the fork server")
                self._start.note_refusal(str(error))
                self._process = await self._start.execute()
        if refusal := self._start.refusal:
            warning = f"{NOT_FORKED}, so every restart imports the libraries again: {refusal}"
            self.report = self.report.model_copy(update={"warnings": (*self.report.warnings, warning)})
        self._start.close()

    async def collect_stderr(self, number: int, quiet_seconds: float) -> list[str]:
        """Send a signal that makes the rank write to stderr, and return the lines.

        Args:
            number: the signal.
            quiet_seconds: the output is complete when no line has arrived for this time.
        """
        self._collected = []
        self.signal(number)
        while True:
            self._line_collected.clear()
            try:
                await asyncio.wait_for(self._line_collected.wait(), quiet_seconds)
            except TimeoutError:
                break
        lines, self._collected = self._collected, None
        return lines

    def _collect(self, line: str) -> None:
        if self._collected is not None:
            self._collected.append(line)
            self._line_collected.set()

    async def _relay(self, stream: asyncio.StreamReader, to: object, keep: deque[str] | None) -> None:
        async for line in read_lines(stream):
            if keep is not None:
                keep.append(line)
                self._collect(line)
            print(f"[rank {self.rank}] {line}", file=to, flush=True)  # type: ignore[call-overload]

    async def _read_reports(self) -> None:
        reader = asyncio.StreamReader(limit=2**20)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(self._report_fd, "rb", buffering=0)
        )
        try:
            async for line in read_lines(reader):
                self._merge(line)
        finally:
            transport.close()

    def _merge(self, line: str) -> None:
        try:
            new = RankReport.model_validate_json(line)
        except ValidationError as error:
            log(f"rank {self.rank} sent an invalid report ({first_error(error)}): {line[:200]}")
            return
        old = self.report
        self._has_reported = True
        update = {name: getattr(new, name) for name in new.model_fields_set if getattr(new, name) is not None}
        update["warnings"] = newest_warnings((*old.warnings, *(w for w in new.warnings if w not in old.warnings)))
        update["outputs"] = new.outputs or old.outputs
        # The detail belongs to the state of the same report.
        update["detail"] = new.detail
        self.report = old.model_copy(update=update)
        if urgent_part(self.report) != urgent_part(old):
            self._start.on_change()


def newest_warnings(warnings: Sequence[str]) -> tuple[str, ...]:
    """Return the newest warnings, and the one that names why the rank was not forked."""
    lasting = [warning for warning in warnings[:-_KEPT_WARNINGS] if warning.startswith(NOT_FORKED)]
    return (*lasting, *warnings[-_KEPT_WARNINGS:])


_KEPT_WARNINGS = 5


def send_signal(process: Process | ForkedProcess, number: int) -> None:
    """Send a signal to a process that may just have ended.

    asyncio's own method polls the process first. That takes the exit code from asyncio's watcher, which then reports
    255.
    """
    if isinstance(process, ForkedProcess):
        process.send_signal(number)
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, number)


def true_exit_code(code: int, state: RankState, *, was_terminated: bool) -> int:
    """Return the exit code of a rank that our SIGTERM may have ended while it had no signal handler.

    Python has no handlers before the rank's first lines, and removes them before the process exits. At these times
    the signal's default action ends a rank that has nothing to save yet, or that has already reported its final state.

    Args:
        code: exit code of the process; 128+n if signal n ended it.
        state: the state that it reported last.
        was_terminated: whether this supervisor sent it SIGTERM.
    """
    if code != 128 + signal.SIGTERM or not was_terminated:
        return code
    if state is RankState.DONE:
        return ExitCode.DONE
    return ExitCode.SAVED if state is RankState.SAVED or state in WITHOUT_STATE else code


def urgent_part(report: RankReport) -> RankReport:
    """Return the part of a report whose change is sent at once: all but the values that change with every step."""
    every_step = ("step", "loss", "images_per_second", "performance", "detail")
    return report.model_copy(update=dict.fromkeys(every_step))


@dataclass(frozen=True)
class RankStart:
    """Everything that is needed to start one rank."""

    command: Sequence[str]
    env: Mapping[str, str]
    place: RankPlace
    on_change: Callable[[], None]
    report_fd: int
    """The rank's end of the pipe for its reports."""
    server: ForkClient | None = None

    async def fork(self) -> ForkedProcess | None:
        """Fork the rank; return None if that is not possible."""
        module = module_of(self.command)
        if self.server is None or module is None or self.server.refusal:
            return None
        try:
            return await self.server.fork(module, self.env, self.place)
        except OSError:
            return None

    @property
    def refusal(self) -> str:
        """Why the fork server cannot fork; empty if it can or if there is none."""
        return "" if self.server is None else self.server.refusal

    def note_refusal(self, reason: str) -> None:
        """Record why the fork server cannot fork, for the ranks of the next attempts, too."""
        if self.server is not None:
            self.server.refusal = reason

    async def execute(self) -> Process:
        """Start the rank by its command."""
        return await asyncio.create_subprocess_exec(
            *self.command,
            env=self.env,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=PIPE,
            stderr=PIPE,
            pass_fds=(self.report_fd,),
            preexec_fn=preparation(self.place),
        )

    def close(self) -> None:
        """Close our copy of the write end: the pipe then ends with the rank."""
        os.close(self.report_fd)


@dataclass(frozen=True)
class RankStarter:
    """Starts the ranks of one pod: forked if a fork server runs, otherwise by their command."""

    command: Sequence[str]
    on_change: Callable[[], None]
    server: ForkClient | None = None

    @classmethod
    async def prepare(
        cls, command: Sequence[str], variables: Mapping[str, str], on_change: Callable[[], None]
    ) -> RankStarter:
        """Start the fork server, which imports the libraries of all ranks, if the command can be forked.

        Args:
            command: command of a rank.
            variables: those that the libraries read when they are loaded.
            on_change: called when a rank has changed.
        """
        server = None
        if module_of(command) is not None:
            inherited = {name: value for name, value in os.environ.items() if name != environment.COORDINATOR_TOKEN}
            with contextlib.suppress(OSError):
                server = await ForkClient.connect(
                    {**inherited, **variables},
                    preparation(RankPlace(1, ())),
                )
        return cls(command, on_change, server)

    async def start(
        self, config: Config, local_rank: int, place: RankPlace, variables: Mapping[str, str] | None = None
    ) -> RankProcess:
        """Start one rank with torch's variables, its place on the node and a pipe for its reports.

        Args:
            config: the configuration of the pod.
            local_rank: number of the rank in the pod.
            place: its cores and memory.
            variables: those of its setup; None: only those of its threads.
        """
        read_fd, write_fd = os.pipe()
        variables = thread_variables(place, os.environ) if variables is None else variables
        env = rank_environment(os.environ, config, local_rank, variables, write_fd)
        start = RankStart(self.command, env, place, self.on_change, write_fd, self.server)
        try:
            process = await start.fork() or await start.execute()
        except BaseException:
            os.close(read_fd)
            start.close()
            raise
        return RankProcess(config.rank(local_rank), process, start, read_fd)


def rank_environment(
    env: Mapping[str, str], config: Config, local_rank: int, variables: Mapping[str, str], report_fd: int
) -> dict[str, str]:
    """Return the environment of one rank: that of the pod without the coordinator's token, plus torch's variables.

    Args:
        env: environment of the pod.
        config: its configuration.
        local_rank: number of the rank in the pod.
        variables: those of its setup.
        report_fd: descriptor of the pipe for its reports.
    """
    inherited = {name: value for name, value in env.items() if name != environment.COORDINATOR_TOKEN}
    return {
        **inherited,
        **variables,
        **dict(config.rendezvous),
        "RANK": str(config.rank(local_rank)),
        "WORLD_SIZE": str(config.world_size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(config.processes_per_node),
        "GROUP_RANK": str(config.node_rank),
        "PYTHONUNBUFFERED": "1",
        environment.REPORT_FD: str(report_fd),
        environment.RANK_ORDERED: str(time.monotonic()),
    }


def preparation(place: RankPlace) -> Callable[[], None]:
    """Return what a child does between fork and exec: only system calls, because other threads may hold locks."""
    bind_memory = memory_binder(place.memory)

    def prepare() -> None:
        # Without its own PID namespace a rank would survive a supervisor that is killed.
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if place.compute:
            os.sched_setaffinity(0, place.compute)
        bind_memory()

    return prepare


async def read_lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Yield the lines of a stream, of any length. They end with a newline or a carriage return (progress bars)."""
    rest = b""
    while chunk := await stream.read(2**16):
        *lines, rest = _LINE_END.split(rest + chunk)
        for line in lines:
            if line:
                yield line.decode(errors="replace")
    if rest:
        yield rest.decode(errors="replace")
