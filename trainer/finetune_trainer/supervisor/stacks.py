"""Stacks of the ranks of a gang that hangs: one file for each rank, stored on the shared storage.

The coordinator requests them; the supervisor calls this module. A rank writes the stacks of its threads itself
(faulthandler, on SIGUSR1). For a rank that cannot (stopped, or inside a system call) py-spy and /proc are read.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from finetune_contract import paths
from finetune_trainer.files import write_atomically
from finetune_trainer.supervisor.config import Config
from finetune_trainer.supervisor.ranks import RankProcess

PEER_SECONDS = 10.0
"""Longest wait for the stacks of the other pods, whose supervisors receive the request with their next heartbeat."""
POLL_SECONDS = 0.2
QUIET_SECONDS = 0.2
"""A stack is complete when no line has arrived for this time."""
PY_SPY_SECONDS = 1.0


async def keep_stacks(config: Config, ranks: Sequence[RankProcess]) -> list[Path]:
    """Write the stacks of all ranks of this pod that still run.

    Returns:
        The files. None of them if the storage cannot be written: the log has the stacks in any case.
    """
    if config.job_dir is None:
        return []
    texts = await asyncio.gather(*(_describe(rank) for rank in ranks if rank.end is None))
    written = []
    for rank, text in zip((rank for rank in ranks if rank.end is None), texts, strict=False):
        path = paths.stack_file(config.job_dir, config.attempt, rank.rank)
        with suppress(OSError):
            await asyncio.to_thread(write_atomically, path, text.encode())
            written.append(path)
    return written


async def wait_for_peers(config: Config) -> None:
    """Wait until the stacks of all ranks of the gang are stored.

    If the ranks of this pod ended earlier, the collectives of the others would fail before their stacks are written.
    """
    if config.job_dir is None:
        return
    files = [paths.stack_file(config.job_dir, config.attempt, rank) for rank in range(config.world_size)]
    with suppress(TimeoutError):
        async with asyncio.timeout(PEER_SECONDS):
            # Shared storage has no events for files that another machine writes.
            while not await asyncio.to_thread(lambda: all(file.exists() for file in files)):  # noqa: ASYNC110
                await asyncio.sleep(POLL_SECONDS)


async def _describe(rank: RankProcess) -> str:
    report = rank.report
    process = describe_process(rank.pid)
    lines = await rank.collect_stderr(signal.SIGUSR1, QUIET_SECONDS)
    if not lines:
        lines = await _py_spy(rank.pid) or ["The process does not respond: it is stopped, or inside a system call."]
    detail = f" ({report.detail})" if report.detail else ""
    head = [
        f"rank {rank.rank}, process {rank.pid}: {report.state.value.lower()} at step {report.step or 0}{detail}",
        f"at {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}",
        f"process state: {process}",
        "",
    ]
    return "\n".join([*head, *lines]) + "\n"


def describe_process(pid: int) -> str:
    """Return the state of a process and the kernel function that it waits in, from /proc."""
    facts = []
    with suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        facts += [line.partition(":")[2].strip() for line in status.splitlines() if line.startswith("State:")]
    with suppress(OSError):
        channel = Path(f"/proc/{pid}/wchan").read_text(encoding="utf-8")
        facts += [f"waits in {channel}"] if channel not in ("", "0") else []
    return ", ".join(facts) or "exited"


async def _py_spy(pid: int) -> list[str]:
    """Return the stacks that py-spy reads from outside; none if it is not installed or not permitted."""
    program = shutil.which("py-spy")
    if program is None:
        return []
    process = await asyncio.create_subprocess_exec(
        *(program, "dump", "--nonblocking", "--pid", str(pid)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), PY_SPY_SECONDS)
    except TimeoutError:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        return []
    return output.decode(errors="replace").splitlines()
