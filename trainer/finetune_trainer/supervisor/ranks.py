"""The rank processes below a supervisor: their environment, their pipes, their end."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass

from finetune_contract import environment
from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import MAX_LAST_WORDS, RankEnd, RankReport, RankState
from finetune_trainer.supervisor.config import Config
from finetune_trainer.supervisor.cores import Share, ccl_environment, thread_environment
from finetune_trainer.supervisor.forks import ForkedProcess, ForkServer, NotForkedError, module_of

CCL = "ccl"
LAST_LINES = 40
DRAIN_SECONDS = 1.0
WITHOUT_STATE = frozenset({RankState.STARTING, RankState.LOADING, RankState.CACHING, RankState.RESTORING})
"""States in which a rank has nothing to save."""
AnyProcess = Process | ForkedProcess
_PR_SET_PDEATHSIG = 1
_LINE_END = re.compile(rb"[\r\n]+")
_libc = ctypes.CDLL(None, use_errno=True)


class RankProcess:
    """One rank: its process and the newest of what it reported."""

    def __init__(self, rank: int, process: AnyProcess, start: Start, report_fd: int) -> None:
        self.rank = rank
        self.report = RankReport(rank=rank, state=RankState.STARTING)
        self.end: RankEnd | None = None
        self._told = False
        """Whether this supervisor has sent it SIGTERM."""
        self._process = process
        self._start = start
        self._report_fd = report_fd
        self._stderr: deque[str] = deque(maxlen=LAST_LINES)
        self._has_reported = False
        self._collected: list[str] | None = None
        self._collects = asyncio.Event()
        """Set by every line that is collected."""

    @property
    def pid(self) -> int:
        """Process id of the rank."""
        return self._process.pid

    def signal(self, number: int) -> None:
        """Send a signal, unless the process has ended. One that no handler takes yet would end it."""
        if number == signal.SIGUSR1 and not self._has_reported:
            return
        if self.end is None and self._process.returncode is None:
            self._told = self._told or number == signal.SIGTERM
            send_signal(self._process, number)

    async def follow(self) -> RankEnd:
        """Relay output and reports until the rank has ended; return how it did."""
        await self._see_begun()
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        readers = [
            asyncio.create_task(self._relay(self._process.stdout, sys.stdout, None)),
            asyncio.create_task(self._relay(self._process.stderr, sys.stderr, self._stderr)),
            asyncio.create_task(self._take_reports()),
        ]
        code = await self._process.wait()
        # What is in the pipes is read to the end, unless a child of the rank outlives it and holds them open.
        _, open_still = await asyncio.wait(readers, timeout=DRAIN_SECONDS)
        for reader in open_still:
            reader.cancel()
        words = "\n".join(self._stderr)[-MAX_LAST_WORDS:]
        code = true_exit_code(code if code >= 0 else 128 - code, self.report.state, told=self._told)
        self.end = RankEnd(rank=self.rank, exit_code=code, last_words=words)
        self._start.on_change()
        return self.end

    async def _see_begun(self) -> None:
        """Where the fork server has ended in place of forking, start the rank without it."""
        if isinstance(self._process, ForkedProcess):
            try:
                await self._process.begun()
            except NotForkedError:
                print("[supervisor] ranks are started without the fork server", file=sys.stderr, flush=True)  # noqa: T201
                self._process = await self._start.execute()
        self._start.close()

    async def collect_stderr(self, number: int, quiet_seconds: float) -> list[str]:
        """Send a signal that makes the rank write to stderr; return the lines, once none has come for so long."""
        self._collected = []
        self.signal(number)
        while True:
            self._collects.clear()
            try:
                await asyncio.wait_for(self._collects.wait(), quiet_seconds)
            except TimeoutError:
                break
        lines, self._collected = self._collected, None
        return lines

    def _collect(self, line: str) -> None:
        if self._collected is not None:
            self._collected.append(line)
            self._collects.set()

    async def _relay(self, stream: asyncio.StreamReader, to: object, keep: deque[str] | None) -> None:
        async for line in read_lines(stream):
            if keep is not None:
                keep.append(line)
                self._collect(line)
            print(f"[rank {self.rank}] {line}", file=to, flush=True)  # type: ignore[call-overload]

    async def _take_reports(self) -> None:
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
            news = RankReport.model_validate_json(line)
        except ValueError:
            print(f"[supervisor] rank {self.rank} sent no report: {line[:200]}", file=sys.stderr)  # noqa: T201
            return
        old = self.report
        self._has_reported = True
        update = {name: getattr(news, name) for name in news.model_fields_set if getattr(news, name) is not None}
        update["warnings"] = (*old.warnings, *(w for w in news.warnings if w not in old.warnings))[-5:]
        update["outputs"] = news.outputs or old.outputs
        # The detail belongs to the state that it was sent with.
        update["detail"] = news.detail
        self.report = old.model_copy(update=update)
        if weighty(self.report) != weighty(old):
            self._start.on_change()


def send_signal(process: Process | ForkedProcess, number: int) -> None:
    """Send a signal to a process that may have just ended.

    asyncio's own way looks first whether it has, and takes the exit code away from asyncio's watcher, which then tells
    of 255.
    """
    if isinstance(process, ForkedProcess):
        process.send_signal(number)
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, number)


def true_exit_code(code: int, state: RankState, *, told: bool) -> int:
    """What the end of a rank means that our SIGTERM may have caught where it could not answer.

    Python takes its handlers away before the process is gone, and has none before the rank's first lines: there the
    signal's default action ends a rank that has said what became of its state, or that has none yet.

    Args:
        code: of the process; 128+n where signal n ended it.
        state: the last that it reported.
        told: whether SIGTERM was sent to it from here.
    """
    if code != 128 + signal.SIGTERM or not told:
        return code
    if state is RankState.DONE:
        return ExitCode.DONE
    return ExitCode.SAVED if state is RankState.SAVED or state in WITHOUT_STATE else code


def weighty(report: RankReport) -> RankReport:
    """What of a report is worth a beat at once: all but the counters that rise with every step."""
    return report.model_copy(update={"step": None, "loss": None, "images_per_second": None, "detail": None})


@dataclass(frozen=True)
class Start:
    """All that it takes to start one rank."""

    command: Sequence[str]
    env: Mapping[str, str]
    share: Share
    on_change: Callable[[], None]
    report_fd: int
    """The rank's end of the pipe for its reports."""

    async def fork(self, server: ForkServer | None) -> ForkedProcess | None:
        """Have the rank forked; None where that cannot be."""
        module = module_of(self.command)
        if server is None or module is None:
            return None
        try:
            return await server.fork(module, self.env, self.share.cores)
        except OSError:
            return None

    async def execute(self) -> Process:
        """Start the rank by its command."""
        return await asyncio.create_subprocess_exec(
            *self.command,
            env=self.env,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=PIPE,
            stderr=PIPE,
            pass_fds=(self.report_fd,),
            preexec_fn=lambda: _prepare(self.share),
        )

    def close(self) -> None:
        """The rank holds its end of the pipe: ours would hide its end."""
        os.close(self.report_fd)


@dataclass(frozen=True)
class Starter:
    """Starts the ranks of one pod: forked where there is a server for it, else by their command."""

    command: Sequence[str]
    on_change: Callable[[], None]
    server: ForkServer | None = None

    @classmethod
    async def ready(cls, command: Sequence[str], share: Share, on_change: Callable[[], None]) -> Starter:
        """Begin to import what all ranks want, unless they run a program that cannot be forked."""
        server = None
        if module_of(command) is not None:
            inherited = {name: value for name, value in os.environ.items() if name != environment.COORDINATOR_TOKEN}
            with contextlib.suppress(OSError):
                server = await ForkServer.find(
                    {**inherited, **thread_environment(share, inherited)},
                    lambda: _prepare(Share(share.num_threads, None)),
                )
        return cls(command, on_change, server)

    async def start(self, config: Config, local_rank: int, share: Share) -> RankProcess:
        """Start one rank with torch's variables, its cores and a pipe for its reports."""
        read_fd, write_fd = os.pipe()
        env = rank_environment(os.environ, config, local_rank, share, write_fd)
        start = Start(self.command, env, share, self.on_change, write_fd)
        try:
            process = await start.fork(self.server) or await start.execute()
        except BaseException:
            os.close(read_fd)
            start.close()
            raise
        return RankProcess(config.rank(local_rank), process, start, read_fd)


def rank_environment(
    env: Mapping[str, str], config: Config, local_rank: int, share: Share, report_fd: int
) -> dict[str, str]:
    """Environment of one rank: the pod's, less the coordinator's token, with torch's standard variables."""
    inherited = {name: value for name, value in env.items() if name != environment.COORDINATOR_TOKEN}
    fabric = ccl_environment(share, local_rank) if env.get(environment.BACKEND) == CCL else {}
    return {
        **fabric,
        **inherited,
        **thread_environment(share, {**fabric, **env}),
        **dict(config.rendezvous),
        "RANK": str(config.rank(local_rank)),
        "WORLD_SIZE": str(config.world_size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(config.processes_per_node),
        "GROUP_RANK": str(config.node_rank),
        "PYTHONUNBUFFERED": "1",
        environment.REPORT_FD: str(report_fd),
    }


def _prepare(share: Share) -> None:
    """Between fork and exec: two system calls and nothing else, for other threads may hold locks."""
    # Without a PID namespace of its own a rank would outlive a supervisor that is killed.
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if share.cores is not None:
        os.sched_setaffinity(0, share.cores)


async def read_lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Lines of a stream, ended by newline or carriage return (progress bars), of any length."""
    rest = b""
    while chunk := await stream.read(2**16):
        *lines, rest = _LINE_END.split(rest + chunk)
        for line in lines:
            if line:
                yield line.decode(errors="replace")
    if rest:
        yield rest.decode(errors="replace")
