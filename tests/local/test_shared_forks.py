"""The fork server that the pods of a run share: who uses it, and when it ends."""

from __future__ import annotations

import asyncio
import os
import select
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from finetune_contract import environment
from finetune_operator.cluster.local.kubelet.container import Container
from finetune_operator.cluster.local.kubelet.launch import SUPERVISOR, resolve_command
from finetune_operator.cluster.local.kubelet.shared_forks import SharedForks
from finetune_trainer.supervisor.forks import ForkServer
from testing.controlplane.process import wait_for

PATIENCE_SECONDS = 180.0
TRAINER = Container(tuple(resolve_command(SUPERVISOR)), {**os.environ, "A": "1"}, None)


@pytest.mark.parametrize(
    "container",
    [
        replace(TRAINER, argv=(sys.executable, "-c", "pass")),
        replace(TRAINER, argv=(*TRAINER.argv, "--", "train.sh")),
        replace(TRAINER, environment={environment.FORK_SERVER: "@another"}),
    ],
    ids=["another program", "ranks of another program", "another server"],
)
def test_who_cannot_use_it_starts_none(container: Container) -> None:
    forks = SharedForks()
    assert forks.join(container) is container
    forks.close()


@pytest.mark.trainer
def test_pods_share_one_that_outlives_the_run_with_its_last_rank(tmp_path: Path) -> None:
    # The rank waits in the pipe that is handed to it: that it reads shows that it lived on.
    (tmp_path / "slow_rank.py").write_text(
        f"import os\nos.read(int(os.environ['{environment.REPORT_FD}']), 1)\nraise SystemExit(7)\n"
    )
    container = replace(TRAINER, environment={**TRAINER.environment, "PYTHONPATH": str(tmp_path)})
    forks = SharedForks()
    first, second = forks.join(container), forks.join(container)
    address = first.environment[environment.FORK_SERVER]
    assert second.environment == {**container.environment, environment.FORK_SERVER: address}
    # Its command line is there a moment after the call that started it.
    [server] = wait_for("the server", _our_servers, PATIENCE_SECONDS)
    descriptor = os.pidfd_open(server)

    async def run() -> int:
        read_fd, write_fd = os.pipe()
        env = {**container.environment, environment.REPORT_FD: str(read_fd)}
        process = await ForkServer(address, None).fork(("slow_rank",), env, None)
        await asyncio.wait_for(process.begun(), PATIENCE_SECONDS)
        await asyncio.to_thread(forks.close)
        assert not select.select([descriptor], [], [], 0)[0]
        os.write(write_fd, b"x")
        return await asyncio.wait_for(process.wait(), PATIENCE_SECONDS)

    assert asyncio.run(run()) == 7
    assert select.select([descriptor], [], [], PATIENCE_SECONDS)[0]
    os.waitpid(server, 0)


def _our_servers() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and _is_our_server(path)]


def _is_our_server(process: Path) -> bool:
    try:
        words = (process / "cmdline").read_bytes()
        parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return False
    return b"fork_server" in words and b"--shared" in words and parent == os.getpid()
