"""The part of `finetune run` that runs: views, signals, the local cluster, and what is said at the end."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from finetune_contract import paths
from finetune_contract.phase import Phase
from finetune_operator.api.job import FineTuneJob
from finetune_operator.cli import preflight
from finetune_operator.cli.clock import utc_now
from finetune_operator.cli.errors import Exit
from finetune_operator.cli.output import summary
from finetune_operator.cli.output.live import LiveView
from finetune_operator.cli.output.plain import PlainView
from finetune_operator.cli.output.stdout import tell
from finetune_operator.cli.output.validation_summary import looks
from finetune_operator.cluster.local import jobs
from finetune_operator.cluster.local.faults import Fault
from finetune_operator.cluster.local.home import Home
from finetune_operator.cluster.local.runner import LocalRun
from finetune_operator.cluster.reconcile import Pass

View = PlainView | LiveView
ENDS = {Phase.SUCCEEDED: Exit.SUCCEEDED, Phase.FAILED: Exit.FAILED}


def drive_job(job: FineTuneJob, home: Home, faults: Sequence[Fault], *, plain: bool, file: Path) -> Exit:
    """Run a job to its end, or until it is interrupted. The caller holds its lock."""
    plain = plain or not sys.stdout.isatty()
    view: View = PlainView(job.status, utc_now) if plain else LiveView(job.status, utc_now)
    with view as audience:
        for sentence in preflight.remarks(job.spec):
            audience.warn(sentence)
        audience.say(summary.headline(job, home.path))
        local_run = LocalRun(home, job, audience, utc_now)
        local_run.plan_faults(faults)
        seen = asyncio.run(_run_to_end(local_run, audience))
    return _conclude(seen.job, home, file)


async def _run_to_end(local_run: LocalRun, view: View) -> Pass:
    def stop() -> None:
        if local_run.interrupted:
            view.say("killing the ranks: what is not saved is lost")
        else:
            view.say("stopping: the ranks save their state first; interrupt once more to kill them")
        local_run.interrupt()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop)
    return await local_run.run()


def _conclude(job: FineTuneJob | None, home: Home, file: Path) -> Exit:
    if job is None:
        tell(sys.stdout, "the job was deleted: its time to live was over\n")
        return Exit.SUCCEEDED
    folder = jobs.storage_folder(home, job)
    outputs = ", ".join(output.to for output in job.status.outputs) or str(folder)
    if job.status.phase is Phase.SUCCEEDED:
        for line in looks(folder / paths.VALIDATION):
            tell(sys.stdout, line + "\n")
    tell(sys.stdout, summary.end(job, outputs, file, utc_now()) + "\n")
    return ENDS.get(job.status.phase or Phase.PENDING, Exit.INTERRUPTED)
