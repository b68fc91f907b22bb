"""The fork server that the pods of a run share: which containers use it, and when it exits."""

from __future__ import annotations

import asyncio
import os
import select
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from finetune_contract import environment
from finetune_contract.cpu.placement import RankPlace
from finetune_operator.cluster.local.kubelet.container import Container
from finetune_operator.cluster.local.kubelet.launch import SUPERVISOR, resolve_command
from finetune_operator.cluster.local.kubelet.shared_fork_server import SharedForkServer
from finetune_trainer.supervisor.forks import ForkClient
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
def test_no_server_starts_for_a_container_that_cannot_use_it(container: Container) -> None:
    server = SharedForkServer()
    assert server.attach(container) is container
    server.close()


@pytest.mark.trainer
def test_pods_share_a_server_that_exits_with_the_last_rank(tmp_path: Path) -> None:
    # The rank blocks on a pipe. Its exit code after the read shows that it survived the end of the run.
    (tmp_path / "slow_rank.py").write_text(
        f"import os\nos.read(int(os.environ['{environment.REPORT_FD}']), 1)\nraise SystemExit(7)\n"
    )
    container = replace(TRAINER, environment={**TRAINER.environment, "PYTHONPATH": str(tmp_path)})
    shared = SharedForkServer()
    first, second = shared.attach(container), shared.attach(container)
    address = first.environment[environment.FORK_SERVER]
    assert second.environment == {**container.environment, environment.FORK_SERVER: address}
    # Its command line appears a moment after the call that started it.
    [server] = wait_for("the server", _find_servers, PATIENCE_SECONDS)
    descriptor = os.pidfd_open(server)

    async def run() -> int:
        read_fd, write_fd = os.pipe()
        env = {**container.environment, environment.REPORT_FD: str(read_fd)}
        process = await ForkClient(address, None).fork(("slow_rank",), env, RankPlace(1, ()))
        await asyncio.wait_for(process.wait_until_forked(), PATIENCE_SECONDS)
        await asyncio.to_thread(shared.close)
        assert not select.select([descriptor], [], [], 0)[0]
        os.write(write_fd, b"x")
        return await asyncio.wait_for(process.wait(), PATIENCE_SECONDS)

    assert asyncio.run(run()) == 7
    assert select.select([descriptor], [], [], PATIENCE_SECONDS)[0]
    os.waitpid(server, 0)


def _find_servers() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and _is_child_server(path)]


def _is_child_server(process: Path) -> bool:
    try:
        command = (process / "cmdline").read_bytes()
        parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return False
    return b"fork_server" in command and b"--shared" in command and parent == os.getpid()
