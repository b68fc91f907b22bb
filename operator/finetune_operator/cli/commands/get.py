"""`finetune get`: shows the columns of `kubectl get ftj`, or -o wide, json and yaml."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

from finetune_operator.api import yaml_text
from finetune_operator.api.job import FineTuneJob
from finetune_operator.cli.clock import utc_now
from finetune_operator.cli.errors import Exit, UsageError
from finetune_operator.cli.output import formatting
from finetune_operator.cli.output.table import format_columns
from finetune_operator.cluster.local.files import BrokenFileError
from finetune_operator.cluster.local.home import Home
from finetune_operator.cluster.local.jobs import read_job
from finetune_operator.cluster.protocol import JobKey

Column = tuple[str, Callable[[FineTuneJob, datetime], str]]


def _checkpoint_age(job: FineTuneJob, now: datetime) -> str:
    checkpoint = job.status.last_checkpoint
    return "" if checkpoint is None else formatting.format_age(checkpoint.time, now)


def _number(value: float | None) -> str:
    return "" if value is None else repr(value).removesuffix(".0")


COLUMNS: tuple[Column, ...] = (
    ("NAME", lambda job, now: job.metadata.name),
    ("METHOD", lambda job, now: job.spec.training.method or ""),
    ("PHASE", lambda job, now: job.status.phase.value if job.status.phase else ""),
    ("STEP", lambda job, now: "" if job.status.step is None else str(job.status.step)),
    ("PROGRESS", lambda job, now: job.status.progress or ""),
    ("ETA", lambda job, now: job.status.eta or ""),
    ("CHECKPOINT", _checkpoint_age),
    ("NODES", lambda job, now: job.status.nodes or ""),
    ("PREEMPTIONS", lambda job, now: str(job.status.preemptions)),
    ("FAILURES", lambda job, now: str(job.status.failures)),
    ("AGE", lambda job, now: formatting.format_age(job.metadata.creation_timestamp, now)),
)
WIDE: tuple[Column, ...] = (
    ("LOSS", lambda job, now: _number(job.status.loss)),
    ("IMAGES/S", lambda job, now: _number(job.status.images_per_second)),
    ("GOODPUT", lambda job, now: _number(job.status.goodput)),
    ("REASON", lambda job, now: job.status.reason or ""),
    ("MESSAGE", lambda job, now: job.status.message or ""),
)


def get(arguments: argparse.Namespace) -> Exit:
    """Carry out `finetune get`."""
    home = Home(arguments.home)
    if arguments.name is not None:
        found = [find_job(home, JobKey(arguments.namespace, arguments.name))]
    else:
        found = list(_read_all(home, arguments.namespace))
    if arguments.output in ("json", "yaml"):
        sys.stdout.write(_format_document(found, arguments))
    elif found:
        sys.stdout.write(format_table(found, utc_now(), wide=arguments.output == "wide"))
    else:
        sys.stderr.write(f"No jobs in namespace {arguments.namespace} of state folder {home.path}.\n")
    return Exit.SUCCEEDED


def format_table(jobs: list[FineTuneJob], now: datetime, *, wide: bool = False) -> str:
    """Return jobs as a table."""
    chosen = COLUMNS + WIDE if wide else COLUMNS
    return format_columns([name for name, _ in chosen], ([cell(job, now) for _, cell in chosen] for job in jobs))


def find_job(home: Home, key: JobKey) -> FineTuneJob:
    """Return the job with a name.

    Raises:
        UsageError: it does not exist, or cannot be read.
    """
    try:
        job = read_job(home, key)
    except (BrokenFileError, OSError) as error:
        raise UsageError(f"{error}; run 'finetune run' with its manifest to recover the job") from error
    if job is None:
        names = ", ".join(other.name for other in home.jobs() if other.namespace == key.namespace)
        raise UsageError(
            f"no job {key.name} in namespace {key.namespace} of {home.path}; existing jobs: {names or 'none'}"
        )
    return job


def to_object(job: FineTuneJob) -> dict[str, Any]:
    """Return a job as kubectl -o json shows it."""
    value: dict[str, Any] = job.model_dump(mode="json", by_alias=True, exclude_none=True)
    return value


def _format_document(jobs: list[FineTuneJob], arguments: argparse.Namespace) -> str:
    value: Any = {"apiVersion": "v1", "kind": "List", "items": [to_object(job) for job in jobs]}
    if arguments.name is not None:
        value = to_object(jobs[0])
    if arguments.output == "json":
        return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return yaml_text.dump(value)


def _read_all(home: Home, namespace: str) -> Iterator[FineTuneJob]:
    for key in home.jobs():
        if key.namespace != namespace:
            continue
        try:
            job = read_job(home, key)
        except (BrokenFileError, OSError) as error:
            sys.stderr.write(f"finetune: warning: {error}\n")
            continue
        if job is not None:
            yield job
