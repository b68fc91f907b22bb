"""The first and the last lines of a run. Pure."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from finetune_contract.phase import Phase
from finetune_operator.api.job import FineTuneJob
from finetune_operator.cli.output import figures
from finetune_operator.manifests import num_nodes


def headline(job: FineTuneJob, home: Path) -> str:
    """What is run, in a line."""
    topology, checkpoint = job.spec.topology, job.status.last_checkpoint
    nodes = figures.plural(num_nodes(job.spec), "node")
    ranks = figures.plural(topology.processes_per_node, "rank")
    begun = f", going on from step {checkpoint.step}" if checkpoint else ""
    what = f"{figures.method(job)} on {nodes} of {ranks} ({topology.accelerator}){begun}"
    return f"{job.metadata.name}: {what}; state in {home}"


def end(job: FineTuneJob, outputs: str, file: Path, now: datetime) -> str:
    """How the job ended, how long it took, what it lost and where its outputs are.

    Args:
        job: finished or suspended.
        outputs: where they are.
        file: the manifest, for the command that goes on.
        now: the time, where the job has no end yet.
    """
    name, status = job.metadata.name, job.status
    if status.phase is Phase.SUCCEEDED:
        return f"{name} Succeeded in {_took(job, now)}: {_tally(job)}; outputs in {outputs}"
    if status.phase is Phase.FAILED:
        return (
            f"{name} Failed after {_took(job, now)}: {status.message} ({_tally(job)})\nIts logs: finetune logs {name}"
        )
    step = status.last_checkpoint.step if status.last_checkpoint else 0
    where = f"at step {step}, which is saved" if step else "before its first checkpoint"
    return f"{name} is suspended {where}; the same command goes on: finetune run {file}"


def _took(job: FineTuneJob, now: datetime) -> str:
    """Time since the first attempt, less that in which the job was suspended."""
    status = job.status
    if status.start_time is None:
        return "no time"
    total = ((status.completion_time or now) - status.start_time).total_seconds()
    return figures.seconds(max(0.0, total - status.tally.suspended_seconds))


def _tally(job: FineTuneJob) -> str:
    status = job.status
    # An attempt that was suspended was no restart.
    num_restarts = status.preemptions + status.failures
    causes = f"{figures.plural(status.preemptions, 'preemption')}, {figures.plural(status.failures, 'failure')}"
    steps = f"{figures.steps(status)} steps" if status.step is not None else "no step"
    restarts, lost = figures.plural(num_restarts, "restart"), figures.plural(status.lost_steps, "step")
    return f"{steps}, {restarts} ({causes}), {lost} lost"
