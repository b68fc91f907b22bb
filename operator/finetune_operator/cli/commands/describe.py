"""`finetune describe`: shows all details of a job in the layout of kubectl describe."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from finetune_contract.identity import NUM_SHOWN
from finetune_contract.methods import peak_learning_rate
from finetune_operator.api.job import Accelerator, FineTuneJob
from finetune_operator.api.status import (
    AttemptStatus,
    Condition,
    FineTuneJobStatus,
    InputStatus,
    OutputStatus,
    PerformanceStatus,
)
from finetune_operator.cli.clock import utc_now
from finetune_operator.cli.commands.get import find_job
from finetune_operator.cli.errors import Exit
from finetune_operator.cli.output import formatting
from finetune_operator.cli.output.formatting import pluralize
from finetune_operator.cli.output.table import format_columns, format_fields, indent_lines
from finetune_operator.cluster.local.files import BrokenFileError, read_json
from finetune_operator.cluster.local.home import Home
from finetune_operator.cluster.local.jobs import storage_folder
from finetune_operator.cluster.local.lock import holder
from finetune_operator.cluster.protocol import JobKey
from finetune_operator.manifests import num_nodes

NONE = "<none>"
SHOWN = 0.005
"""Shares of the time from this one on are shown."""


def describe(arguments: argparse.Namespace) -> Exit:
    """Carry out `finetune describe`."""
    home = Home(arguments.home)
    key = JobKey(arguments.namespace, arguments.name)
    job = find_job(home, key)
    try:
        events = read_json(home.job(key).events, list) or []
    except BrokenFileError as error:
        sys.stderr.write(f"finetune: warning: {error}\n")
        events = []
    runner = holder(home.job(key).lock)
    details = LocalDetails(str(storage_folder(home, job)), f"process {runner.pid}" if runner else NONE)
    sys.stdout.write(format_description(job, events, details, utc_now()))
    return Exit.SUCCEEDED


@dataclass(frozen=True)
class LocalDetails:
    """Details of a job that exist only for a local run."""

    folder: str
    """Folder of its checkpoints."""
    runner: str
    """The process that runs it now, or `NONE`."""


def format_description(job: FineTuneJob, events: list[dict[str, Any]], details: LocalDetails, now: datetime) -> str:
    """Return all details of a job as text, with ages relative to `now`."""
    meta = job.metadata
    head = [
        ("Name", meta.name),
        ("Namespace", meta.namespace),
        ("Labels", "\n".join(f"{name}={value}" for name, value in sorted(meta.labels.items())) or NONE),
        ("Created", _time(meta.creation_timestamp, now)),
        ("Folder", details.folder),
        ("Run by", details.runner),
    ]
    parts = [
        format_fields(head),
        "Spec:\n",
        format_fields(_spec(job), 2),
        "Status:\n",
        format_fields(_status(job.status, now), 2),
    ]
    parts += ["Conditions:\n", indent_lines(_conditions(job.status.conditions, now))]
    parts += ["Attempts:\n", indent_lines(_attempts(job.status.attempts, now)), *_last_outputs(job.status.attempts)]
    if job.status.inputs:
        header = ("Field", "Location", "Commit", "Content", "Samples")
        parts += ["Inputs:\n", indent_lines(format_columns(header, map(_input, job.status.inputs)))]
    if job.status.outputs:
        header = ("Format", "State", "Size", "SHA-256", "To")
        parts += ["Outputs:\n", indent_lines(format_columns(header, map(_output, job.status.outputs)))]
    parts += ["Events:\n", indent_lines(_events(events, now))]
    return "".join(parts)


def _output(output: OutputStatus) -> tuple[str, ...]:
    """Return the row of an output; the reason of a failure replaces its hash."""
    state = output.state.value
    if output.delivered_bytes is not None and output.bytes:
        state += f" {100 * output.delivered_bytes // output.bytes}%"
    size = formatting.format_size(output.bytes) if output.bytes else ""
    return output.format, state, size, output.message or (output.sha256 or "")[:12], output.to


def _spec(job: FineTuneJob) -> Iterator[tuple[str, str]]:
    spec, training, topology = job.spec, job.spec.training, job.spec.topology
    yield "Model", spec.model.base
    yield "Dataset", f"{spec.dataset.source} ({spec.dataset.split})"
    yield "Method", formatting.format_method(job)
    length = f"{training.steps} steps" if training.steps else f"{training.epochs} epochs" if training.epochs else ""
    if length:
        yield "Length", length
    num_ranks = num_nodes(spec) * topology.processes_per_node
    yield (
        "Batch",
        f"{training.batch_size} x {training.gradient_accumulation} x {pluralize(num_ranks, 'rank')}",
    )
    yield "Learning rate", f"{peak_learning_rate(training):g} ({training.lr_scheduler.value})"
    default = "fp32" if topology.accelerator is Accelerator.CPU else "bf16 where supported"
    yield "Resolution", f"{training.resolution} px, {training.precision.value if training.precision else default}"
    yield (
        "Topology",
        f"{pluralize(num_nodes(spec), 'node')} x {pluralize(topology.processes_per_node, 'rank')}, "
        f"{topology.accelerator.value}",
    )
    if spec.suspend:
        yield "Suspend", "true"


def _status(status: FineTuneJobStatus, now: datetime) -> Iterator[tuple[str, str]]:
    yield "Phase", status.phase.value if status.phase else NONE
    yield "Reason", status.reason or NONE
    yield "Message", status.message or NONE
    yield "Step", formatting.format_steps(status) + (f" ({status.progress})" if status.progress else "") or NONE
    if status.eta:
        yield "ETA", status.eta
    if status.loss is not None:
        yield "Loss", formatting.format_loss(status.loss)
    if status.images_per_second is not None:
        yield "Speed", formatting.format_rate(status.images_per_second)
    if (performance := status.performance) is not None:
        yield from _performance(performance)
    if (checkpoint := status.last_checkpoint) is not None:
        age = formatting.format_age(checkpoint.time, now)
        yield "Last checkpoint", f"step {checkpoint.step}, {formatting.format_size(checkpoint.bytes)}, {age} ago"
    yield "Nodes", status.nodes or NONE
    yield "Preemptions", str(status.preemptions)
    yield "Failures", str(status.failures)
    yield "Lost steps", str(status.lost_steps)
    if status.goodput is not None:
        yield "Goodput", f"{status.goodput:.3g}"
    if status.start_time is not None:
        yield "Started", _time(status.start_time, now)
    if status.completion_time is not None:
        yield "Completed", _time(status.completion_time, now)
    if status.warnings:
        yield "Warnings", "\n".join(status.warnings)


def _performance(performance: PerformanceStatus) -> Iterator[tuple[str, str]]:
    if performance.share_of_peak is not None:
        yield "Share of peak", f"{performance.share_of_peak:.1%} ({performance.teraflops or 0:g} TFLOP/s per device)"
    if performance.utilization is not None:
        yield "Utilization", f"{performance.utilization:.0%}"
    if performance.memory_allocated_bytes is not None:
        yield "Memory", formatting.format_memory(performance)
    parts = [f"{name} {share:.0%}" for name, share in performance.time_shares if share >= SHOWN]
    yield "Time", ", ".join(parts)
    if performance.bound_by is not None:
        yield "Bound by", performance.bound_by.value
    if performance.advice:
        yield "Advice", "\n".join(performance.advice)


def _conditions(conditions: tuple[Condition, ...], now: datetime) -> str:
    if not conditions:
        return NONE + "\n"
    rows = [
        (entry.type, entry.status, entry.reason, formatting.format_age(entry.last_transition_time, now), entry.message)
        for entry in conditions
    ]
    return format_columns(("Type", "Status", "Reason", "Since", "Message"), rows)


def _attempts(attempts: tuple[AttemptStatus, ...], now: datetime) -> str:
    """Return the ledger as a table."""
    if not attempts:
        return NONE + "\n"
    header = ("Attempt", "Started", "Duration", "Steps", "Ended by", "Counts as", "Rank", "Node", "Exit", "Lost")
    return format_columns(header, (_attempt(entry, now) for entry in attempts))


def _attempt(entry: AttemptStatus, now: datetime) -> list[str]:
    first = "" if entry.from_step is None else str(entry.from_step)
    last = "" if entry.to_step is None else str(entry.to_step)
    return [
        str(entry.attempt),
        formatting.format_age(entry.started_at, now) + " ago",
        formatting.format_duration(((entry.ended_at or now) - entry.started_at).total_seconds()),
        f"{first}-{last}" if first or last else "",
        entry.reason or ("" if entry.ended_at is None else "?"),
        entry.counts_as or "",
        _text(entry.rank),
        entry.node or "",
        _text(entry.exit_code),
        _text(entry.lost_steps),
    ]


def _input(entry: InputStatus) -> list[str]:
    hashes = ("" if each is None else each[:NUM_SHOWN] for each in (entry.commit, entry.content))
    return [entry.field, entry.location, *hashes, _text(entry.samples)]


def _last_outputs(attempts: tuple[AttemptStatus, ...]) -> Iterator[str]:
    for entry in attempts:
        if entry.message:
            yield f"Last output of attempt {entry.attempt}:\n"
            yield indent_lines(entry.message.rstrip("\n") + "\n")


def _events(events: list[dict[str, Any]], now: datetime) -> str:
    if not events:
        return NONE + "\n"
    rows = [(event["type"], event["reason"], _since(event, now), event["message"]) for event in events]
    return format_columns(("Type", "Reason", "Age", "Message"), rows)


def _since(event: dict[str, Any], now: datetime) -> str:
    """Return the age of an event in kubectl's format: '5s', or '5s (x3 over 2m)'."""
    last = formatting.format_age(datetime.fromisoformat(event["lastTimestamp"]), now)
    if event["count"] == 1:
        return last
    return (
        f"{last} (x{event['count']} over {formatting.format_age(datetime.fromisoformat(event['firstTimestamp']), now)})"
    )


def _time(moment: datetime | None, now: datetime) -> str:
    if moment is None:
        return NONE
    return f"{moment.astimezone():%Y-%m-%d %H:%M:%S %Z} ({formatting.format_age(moment, now)} ago)"


def _text(value: int | None) -> str:
    return "" if value is None else str(value)
