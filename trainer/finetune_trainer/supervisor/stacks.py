"""What the ranks of a gang that stands still were doing: one file for each rank, kept on the shared storage.

Asked for by the coordinator; called by the supervisor. A rank that runs writes its threads' stacks itself
(faulthandler, on SIGUSR1). Of one that cannot (stopped, or deep in the kernel) py-spy and /proc tell what there is.
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
from finetune_trainer.files import write_aside
from finetune_trainer.supervisor.config import Config
from finetune_trainer.supervisor.ranks import RankProcess

QUIET_SECONDS = 0.2
"""A stack is whole when nothing more has come for so long."""
PY_SPY_SECONDS = 1.0


async def keep_stacks(config: Config, ranks: Sequence[RankProcess]) -> list[Path]:
    """Write the stacks of all ranks of this pod that still run.

    Returns:
        The files; none where the storage cannot be written (the log has the stacks all the same).
    """
    if config.job_dir is None:
        return []
    texts = await asyncio.gather(*(_describe(rank) for rank in ranks if rank.end is None))
    written = []
    for rank, text in zip((rank for rank in ranks if rank.end is None), texts, strict=False):
        path = paths.stack_file(config.job_dir, config.attempt, rank.rank)
        with suppress(OSError):
            await asyncio.to_thread(write_aside, path, text.encode())
            written.append(path)
    return written


async def _describe(rank: RankProcess) -> str:
    report = rank.report
    process = read_process(rank.pid)
    lines = await rank.collect_stderr(signal.SIGUSR1, QUIET_SECONDS)
    if not lines:
        lines = await _py_spy(rank.pid) or ["It did not answer: it is stopped, or in the middle of a system call."]
    detail = f" ({report.detail})" if report.detail else ""
    head = [
        f"rank {rank.rank}, process {rank.pid}: {report.state.value.lower()} at step {report.step or 0}{detail}",
        f"at {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}",
        f"process state: {process}",
        "",
    ]
    return "\n".join([*head, *lines]) + "\n"


def read_process(pid: int) -> str:
    """State of a process and what it waits for in the kernel, in the words of /proc."""
    words = []
    with suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        words += [line.partition(":")[2].strip() for line in status.splitlines() if line.startswith("State:")]
    with suppress(OSError):
        channel = Path(f"/proc/{pid}/wchan").read_text(encoding="utf-8")
        words += [f"waits in {channel}"] if channel not in ("", "0") else []
    return ", ".join(words) or "gone"


async def _py_spy(pid: int) -> list[str]:
    """The stacks that py-spy reads from outside; nothing where it is not installed or may not."""
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
