"""Ranks that a real fork server forks, and ranks that start without one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_contract import environment
from finetune_contract.cpu.placement import RankPlace
from finetune_contract.exit_codes import ExitCode
from finetune_contract.fork_socket import address_of, listen, server_command
from finetune_contract.heartbeat import NOT_FORKED, RankEnd, RankState
from finetune_trainer.supervisor import fork_server
from finetune_trainer.supervisor.forks import ForkClient
from finetune_trainer.supervisor.ranks import RankProcess, RankStarter, newest_warnings
from testing.trainer.supervisor_config import make_config

pytestmark = pytest.mark.trainer

TIMEOUT_SECONDS = 60.0
CONFIG = make_config(node_rank=1, num_nodes=2)
FORKED = """
import json, os, sys, torch
seen = {"rank": os.environ["RANK"], "cores": sorted(os.sched_getaffinity(0)), "threads": torch.get_num_threads(),
        "argv": sys.argv[1:], "parent": os.getppid()}
report = {"rank": 1, "state": "Training", "step": 5}
os.write(int(os.environ["FINETUNE_REPORT_FD"]), json.dumps(report).encode() + b"\\n")
print("a line of the log")
print(json.dumps(seen), file=sys.stderr)
sys.exit(7)
"""
WAITING = "import signal\nsignal.pause()\n"


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("modules")
    (folder / "forked_rank.py").write_text(FORKED)
    (folder / "waiting_rank.py").write_text(WAITING)
    return folder


@pytest.fixture(scope="module", name="server")
def _server(folder: Path) -> Iterator[tuple[ForkClient, int]]:
    env = {**os.environ, "PYTHONPATH": str(folder), "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with listen() as listening:
        process = subprocess.Popen(server_command(listening.fileno()), env=env, pass_fds=(listening.fileno(),))
        address = address_of(listening)
    yield ForkClient(address, None), process.pid
    process.kill()
    process.wait()


def run(module: str, server: ForkClient | None, *signals: int, share: RankPlace | None = None) -> RankEnd:
    """Start a rank, send it signals right after the order, and return its end."""

    async def run_rank() -> RankEnd:
        command = (sys.executable, "-m", module, "one", "two")
        rank = await RankStarter(command, lambda: None, server).start(CONFIG, 0, share or RankPlace(1, ()))
        for number in signals:
            rank.signal(number)
        return await asyncio.wait_for(rank.follow(), TIMEOUT_SECONDS)

    return asyncio.run(run_rank())


def test_a_forked_rank_equals_a_started_one(
    server: tuple[ForkClient, int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    core = min(os.sched_getaffinity(0))
    end = run("forked_rank", server[0], share=RankPlace(1, (core,)))
    assert end.exit_code == 7
    result = json.loads(end.last_words)
    parent = server[1]
    assert result == {"rank": "1", "cores": [core], "threads": 3, "argv": ["one", "two"], "parent": parent}
    assert "[rank 1] a line of the log" in capsys.readouterr().out


def test_reports_of_a_forked_rank_arrive(server: tuple[ForkClient, int]) -> None:
    async def run_rank() -> RankProcess:
        command = (sys.executable, "-m", "forked_rank")
        rank = await RankStarter(command, lambda: None, server[0]).start(CONFIG, 0, RankPlace(1, ()))
        await asyncio.wait_for(rank.follow(), TIMEOUT_SECONDS)
        return rank

    report = asyncio.run(run_rank()).report
    assert (report.state, report.step) == (RankState.TRAINING, 5)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, ExitCode.SAVED), (signal.SIGKILL, 137)])
def test_signals_reach_a_forked_rank(server: tuple[ForkClient, int], number: int, code: int) -> None:
    async def run_rank() -> RankEnd:
        rank = await RankStarter((sys.executable, "-m", "waiting_rank"), lambda: None, server[0]).start(
            CONFIG, 0, RankPlace(1, ())
        )
        following = asyncio.create_task(rank.follow())
        async with asyncio.timeout(TIMEOUT_SECONDS):
            while not rank.pid:  # noqa: ASYNC110  no event announces it
                await asyncio.sleep(0.001)
        rank.signal(number)
        return await asyncio.wait_for(following, TIMEOUT_SECONDS)

    assert asyncio.run(run_rank()).exit_code == code


@pytest.mark.parametrize("number", fork_server.GROUP_SIGNALS)
def test_a_signal_right_after_the_fork_is_not_lost(number: int) -> None:
    """The server ignores these signals, and its children inherit that until they have their own handling of them."""
    source = f"""
import os, signal
from finetune_trainer.supervisor import fork_server
fork = os.fork
def fork_and_signal():
    pid = fork()
    if pid == 0:
        os.kill(os.getpid(), {number})
    return pid
os.fork = fork_and_signal
fork_server.main()
"""
    with listen() as listening:
        server = subprocess.Popen(
            [sys.executable, "-c", source, str(listening.fileno())], pass_fds=(listening.fileno(),)
        )
        address = address_of(listening)
    try:
        end = run("forked_rank", ForkClient(address, None))
    finally:
        server.kill()
        server.wait()
    assert (end.exit_code, end.last_words) == (128 + number, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_process_group_does_not_end_the_server(server: tuple[ForkClient, int], number: int) -> None:
    """If it did, the kernel would kill the ranks with their parent, before they can save."""
    # A signal that the process ignores is discarded at once, so the next rank proves that the server has survived it.
    assert run("forked_rank", server[0]).exit_code == 7
    os.kill(server[1], number)
    assert run("forked_rank", server[0]).exit_code == 7


def test_a_rank_ends_with_the_connection_of_its_client(server: tuple[ForkClient, int]) -> None:
    async def run_rank() -> int:
        read_fd, write_fd = os.pipe()
        env = {**os.environ, environment.REPORT_FD: str(write_fd)}
        process = await server[0].fork(["waiting_rank"], env, RankPlace(1, ()))
        await process.wait_until_forked()
        os.close(read_fd)
        os.close(write_fd)
        return os.pidfd_open(process.pid)

    descriptor = asyncio.run(run_rank())
    assert select.select([descriptor], [], [], TIMEOUT_SECONDS)[0], "a rank survived the connection of its client"
    os.close(descriptor)


def test_a_signal_before_the_fork_cancels_the_rank() -> None:
    with listen() as listening:
        assert run("waiting_rank", ForkClient(address_of(listening), None), signal.SIGTERM).exit_code == ExitCode.SAVED
        assert run("waiting_rank", ForkClient(address_of(listening), None), signal.SIGKILL).exit_code == 137


def test_a_rank_starts_by_its_command_without_a_server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(folder))
    with listen() as listening:
        address = address_of(listening)
    assert run("forked_rank", ForkClient(address, None)).exit_code == 7


def test_a_rank_starts_by_its_command_if_the_server_exits_before_the_fork(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(folder))

    async def run_rank() -> RankEnd:
        with listen() as listening:
            starter = RankStarter(
                (sys.executable, "-m", "forked_rank"), lambda: None, ForkClient(address_of(listening), None)
            )
            rank = await starter.start(CONFIG, 0, RankPlace(1, ()))
            connection, _ = listening.accept()
            connection.close()
            return await asyncio.wait_for(rank.follow(), TIMEOUT_SECONDS)

    assert asyncio.run(run_rank()).exit_code == 7


def test_ranks_start_by_their_command_and_say_why_if_the_server_must_not_fork(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(folder))
    source = """
import threading
from finetune_trainer import libraries
from finetune_trainer.supervisor import fork_server

def preload(imported):
    threading.Thread(target=threading.Event().wait, name="poller", daemon=True).start()
    imported("a_library")

libraries.preload = preload
fork_server.main()
"""
    with listen() as listening:
        process = subprocess.Popen(
            [sys.executable, "-c", source, str(listening.fileno())], pass_fds=(listening.fileno(),)
        )
        client = ForkClient(address_of(listening), None)

    async def run_twice() -> list[RankProcess]:
        starter = RankStarter((sys.executable, "-m", "forked_rank"), lambda: None, client)
        ranks = []
        for _ in range(2):
            rank = await starter.start(CONFIG, 0, RankPlace(1, ()))
            await asyncio.wait_for(rank.follow(), TIMEOUT_SECONDS)
            ranks.append(rank)
        return ranks

    reason = "after the import of a_library the thread poller of threading.Event.wait has started"
    for rank in asyncio.run(run_twice()):
        assert rank.end is not None
        assert rank.end.exit_code == 7
        assert rank.report.warnings == (
            f"ranks are not forked, so every restart imports the libraries again: {reason}",
        )
    assert process.wait(TIMEOUT_SECONDS) == fork_server.UNSAFE
    assert f"[supervisor] the ranks are not forked: {reason}" in capfd.readouterr().err


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to switch to another user")
def test_orders_of_another_user_are_refused(server: tuple[ForkClient, int]) -> None:
    other_user = os.fork()
    if other_user == 0:
        refused = False
        with contextlib.suppress(OSError):
            os.setuid(65534)
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(TIMEOUT_SECONDS)
            connection.connect("\0" + server[0].address[1:])
            refused = connection.recv(1) == b""
        os._exit(0 if refused else 1)
    _, status = os.waitpid(other_user, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert run("forked_rank", server[0]).exit_code == 7


def test_invalid_orders_do_not_stop_the_server(server: tuple[ForkClient, int]) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect("\0" + server[0].address[1:])
        connection.sendall(b"\0\0\0\0\0\0\0\2{}")
        assert connection.recv(1) == b""
    assert run("forked_rank", server[0]).exit_code == 7


def test_reason_outlives_newer_warnings() -> None:
    """The advice in the status is read from it."""
    refusal = f"{NOT_FORKED}: a thread"
    assert newest_warnings([refusal, *map(str, range(7))]) == (refusal, "2", "3", "4", "5", "6")
    assert newest_warnings(["1", refusal]) == ("1", refusal)
