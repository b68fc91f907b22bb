"""Runs a job for `finetune run`: view, signals, local cluster, and the summary at the end."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from finetune_contract import paths
from finetune_contract.phase import Phase
from finetune_operator.api.job import FineTuneJob
from finetune_operator.cli.clock import utc_now
from finetune_operator.cli.errors import Exit
from finetune_operator.cli.output import summary
from finetune_operator.cli.output.live_view import LiveView
from finetune_operator.cli.output.plain_view import PlainView
from finetune_operator.cli.output.streams import write_flushed
from finetune_operator.cli.output.validation_summary import describe_validation
from finetune_operator.cli.preflight.check import find_warnings
from finetune_operator.cluster.local import jobs
from finetune_operator.cluster.local.faults import PlannedFault
from finetune_operator.cluster.local.home import Home
from finetune_operator.cluster.local.runner import LocalRun
from finetune_operator.cluster.reconcile import ReconcileResult

View = PlainView | LiveView
REPEAT_SECONDS = 1.0
"""A signal that follows the previous one within this time belongs to the same request.

`timeout` sends a signal to its child and then to the child's process group: one request arrives twice.
"""
ENDS = {Phase.SUCCEEDED: Exit.SUCCEEDED, Phase.FAILED: Exit.FAILED}


class StopRequests:
    """The requests to stop so far.

    Args:
        clock: monotonic time in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last: float | None = None

    def is_new(self) -> bool:
        """Record a signal, and return whether it is a new request instead of a repetition of the previous one."""
        now = self._clock()
        is_new = self._last is None or now - self._last >= REPEAT_SECONDS
        if is_new:
            self._last = now
        return is_new


def drive_job(job: FineTuneJob, home: Home, faults: Sequence[PlannedFault], *, plain: bool, file: Path) -> Exit:
    """Run a job until it finishes or is interrupted. The caller holds its lock."""
    plain = plain or not sys.stdout.isatty()
    view: View = PlainView(job.status, utc_now) if plain else LiveView(job.status, utc_now)
    with view:
        for warning in find_warnings(job.spec):
            view.warn(warning)
        view.print_line(summary.format_headline(job, home.path))
        local_run = LocalRun(home, job, view, utc_now)
        local_run.plan_faults(faults)
        last = asyncio.run(_run_to_end(local_run, view))
    return _conclude(last.job, home, file)


async def _run_to_end(local_run: LocalRun, view: View) -> ReconcileResult:
    loop = asyncio.get_running_loop()
    requests = StopRequests(loop.time)

    def stop() -> None:
        if not requests.is_new():
            return
        if local_run.interrupted:
            view.print_line("killing the ranks: progress since the last checkpoint is lost")
        else:
            view.print_line("stopping: the ranks save their state first; press Ctrl-C again to kill them")
        local_run.interrupt()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop)
    return await local_run.run()


def _conclude(job: FineTuneJob | None, home: Home, file: Path) -> Exit:
    if job is None:
        write_flushed(sys.stdout, "the job was deleted: its TTL expired\n")
        return Exit.SUCCEEDED
    folder = jobs.storage_folder(home, job)
    outputs = ", ".join(output.to for output in job.status.outputs) or str(folder)
    if job.status.phase is Phase.SUCCEEDED:
        for line in describe_validation(folder / paths.VALIDATION):
            write_flushed(sys.stdout, line + "\n")
    write_flushed(sys.stdout, summary.format_end(job, outputs, file, utc_now()) + "\n")
    return ENDS.get(job.status.phase or Phase.PENDING, Exit.INTERRUPTED)
