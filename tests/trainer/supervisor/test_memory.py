"""A rank whose pod runs out of memory: the cgroup's counter tells it from a rank that somebody killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from finetune_contract.heartbeat import RankEnd
from finetune_trainer.supervisor.memory import describe_oom_kill, memory_limit, num_oom_kills

V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup/cgroup.controllers")
LIMIT_BYTES = 200 * 2**20
TIMEOUT_SECONDS = 60
FOLLOW = """
import asyncio, sys
from finetune_contract.cpu.placement import RankPlace
from finetune_trainer.supervisor.config import Config
from finetune_trainer.supervisor.ranks import RankStarter
config = Config(
    namespace="default", job="j", job_uid="u", pod="j-a1-n0", pod_uid="p", attempt=1, node_rank=0, num_nodes=1,
    processes_per_node=1, coordinator_url="", coordinator_token=None, coordinator_ca=None, beat_seconds=1.0,
    termination_log=None,
)
async def main():
    command = (sys.executable, "-c", sys.argv[1])
    rank = await RankStarter(command, lambda: None).start(config, 0, RankPlace(1, ()))
    end = await rank.follow()
    print("END", end.to_json())
asyncio.run(main())
"""
ALLOCATE = "x = bytearray(2**30); x[::4096] = b'x' * len(x[::4096])"
KILLS_ITSELF = (
    "import os, signal, sys; print('last line', file=sys.stderr, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
)
WORKER_DIES = f"""
import subprocess, sys
worker = subprocess.run([sys.executable, "-c", {ALLOCATE!r}])
sys.exit("RuntimeError: worker exited with " + str(worker.returncode))
"""


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A memory cgroup with a limit that the kernel enforces."""
    if os.geteuid() != 0 or (not V1.is_dir() and not V2.exists()):
        pytest.skip("needs root and a memory cgroup")
    parent = V1 if V1.is_dir() else V2.parent
    group = parent / f"finetune-test-{os.getpid()}"
    group.mkdir()
    (group / ("memory.limit_in_bytes" if V1.is_dir() else "memory.max")).write_text(str(LIMIT_BYTES))
    yield group
    with suppress(OSError):
        group.rmdir()


def follow(group: Path, rank: str) -> RankEnd:
    """Run a rank and its supervisor's part in the cgroup; return the end that the supervisor reports."""
    done = subprocess.run(
        [sys.executable, "-c", FOLLOW, rank],
        preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=True,
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("END"))
    return RankEnd.model_validate(json.loads(line.removeprefix("END")))


@pytest.mark.parametrize(("rank", "code"), [(ALLOCATE, 128 + signal.SIGKILL), (WORKER_DIES, 1)])
def test_rank_that_ends_for_lack_of_memory_says_so(cgroup: Path, rank: str, code: int) -> None:
    """The kernel kills the rank itself, or a worker of its data loader."""
    end = follow(cgroup, rank)
    assert end.exit_code == code
    assert end.last_words.splitlines()[-1] == describe_oom_kill(LIMIT_BYTES)
    assert "whose memory limit is 200 MiB" in end.last_words


def test_rank_that_somebody_kills_is_not_out_of_memory(cgroup: Path) -> None:
    end = follow(cgroup, KILLS_ITSELF)
    assert (end.exit_code, end.last_words) == (128 + signal.SIGKILL, "last line")


@pytest.mark.parametrize(
    ("own", "folder", "events", "limit"),
    [
        ("0::/kubepods/pod1\n", "kubepods/pod1", "memory.events", "memory.max"),
        ("0::/\n", "", "memory.events", "memory.max"),
        ("4:memory:/pod1\n0::/\n", "memory/pod1", "memory.oom_control", "memory.limit_in_bytes"),
        ("4:cpu,memory:/not/visible\n", "memory", "memory.oom_control", "memory.limit_in_bytes"),
    ],
    ids=["v2 on the host", "v2 in a container", "v1 on the host", "v1 in a container"],
)
def test_counter_and_limit_of_both_versions(tmp_path: Path, own: str, folder: str, events: str, limit: str) -> None:
    (tmp_path / "own").write_text(own)
    group = tmp_path / "cgroup" / folder
    group.mkdir(parents=True)
    assert num_oom_kills(tmp_path / "cgroup", tmp_path / "own") == 0
    assert memory_limit(tmp_path / "cgroup", tmp_path / "own") is None
    (group / events).write_text("low 0\noom 3\noom_kill 2\n")
    (group / limit).write_text("1048576\n")
    assert num_oom_kills(tmp_path / "cgroup", tmp_path / "own") == 2
    assert memory_limit(tmp_path / "cgroup", tmp_path / "own") == 2**20


@pytest.mark.parametrize("text", ["max\n", "9223372036854771712\n"])
def test_no_limit(tmp_path: Path, text: str) -> None:
    (tmp_path / "memory.max").write_text(text)
    assert memory_limit(tmp_path, tmp_path / "own") is None
