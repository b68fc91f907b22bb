"""Formats the first and the last lines of a run. Pure."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from finetune_contract.phase import Phase
from finetune_operator.api.job import FineTuneJob
from finetune_operator.cli.output import formatting
from finetune_operator.cli.output.formatting import pluralize
from finetune_operator.manifests import num_nodes


def format_headline(job: FineTuneJob, home: Path) -> str:
    """Return a line that describes the run."""
    topology, checkpoint = job.spec.topology, job.status.last_checkpoint
    nodes = pluralize(num_nodes(job.spec), "node")
    ranks = pluralize(topology.processes_per_node, "rank")
    resumed = f", resuming from step {checkpoint.step}" if checkpoint else ""
    method = formatting.format_method(job)
    return (
        f"{job.metadata.name}: {method} on {nodes} with {ranks} each ({topology.accelerator}){resumed}; state in {home}"
    )


def format_end(job: FineTuneJob, outputs: str, file: Path, now: datetime) -> str:
    """Return how the job ended, how long it took, what it lost and where its outputs are.

    Args:
        job: finished or suspended.
        outputs: locations of its outputs.
        file: the manifest, for the command that resumes the job.
        now: the current time, used if the job has not ended.
    """
    name, status = job.metadata.name, job.status
    if status.phase is Phase.SUCCEEDED:
        return f"{name} Succeeded in {_took(job, now)}: {_tally(job)}; outputs in {outputs}"
    if status.phase is Phase.FAILED:
        ended = f"{name} Failed after {_took(job, now)}: {status.message} ({_tally(job)})"
        advice = f"See its logs: finetune logs {name}\nTo continue after its cause is fixed: finetune run {file}"
        return f"{ended}\n{advice}"
    step = status.last_checkpoint.step if status.last_checkpoint else 0
    state = f"at step {step}, with the state saved" if step else "before its first checkpoint"
    return f"{name} is suspended {state}; to resume: finetune run {file}"


def _took(job: FineTuneJob, now: datetime) -> str:
    """Return the time since the first attempt started, without the time in which the job was suspended."""
    status = job.status
    if status.start_time is None:
        return "no time"
    total = ((status.completion_time or now) - status.start_time).total_seconds()
    return formatting.format_duration(max(0.0, total - status.tally.suspended_seconds))


def _tally(job: FineTuneJob) -> str:
    status = job.status
    # A suspended attempt does not count as a restart.
    num_restarts = status.preemptions + status.failures
    causes = f"{pluralize(status.preemptions, 'preemption')}, {pluralize(status.failures, 'failure')}"
    steps = f"{formatting.format_steps(status)} steps" if status.step is not None else "no step"
    restarts, lost = pluralize(num_restarts, "restart"), pluralize(status.lost_steps, "step")
    return f"{steps}, {restarts} ({causes}), {lost} lost"
