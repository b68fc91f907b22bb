"""`finetune get`: the columns of `kubectl get ftj`, and -o wide, json and yaml."""

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
from finetune_operator.cli.output import figures
from finetune_operator.cli.output.table import columns
from finetune_operator.cluster.local.files import BrokenFileError
from finetune_operator.cluster.local.home import Home
from finetune_operator.cluster.local.jobs import read_job
from finetune_operator.cluster.protocol import JobKey

Column = tuple[str, Callable[[FineTuneJob, datetime], str]]


def _checkpoint_age(job: FineTuneJob, now: datetime) -> str:
    checkpoint = job.status.last_checkpoint
    return "" if checkpoint is None else figures.age(checkpoint.time, now)


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
    ("AGE", lambda job, now: figures.age(job.metadata.creation_timestamp, now)),
)
WIDE: tuple[Column, ...] = (
    ("LOSS", lambda job, now: _number(job.status.loss)),
    ("IMAGES/S", lambda job, now: _number(job.status.images_per_second)),
    ("GOODPUT", lambda job, now: _number(job.status.goodput)),
    ("MESSAGE", lambda job, now: job.status.message or ""),
)


def get(arguments: argparse.Namespace) -> Exit:
    """Carry out `finetune get`."""
    home = Home(arguments.home)
    if arguments.name is not None:
        found = [find(home, JobKey(arguments.namespace, arguments.name))]
    else:
        found = list(_all(home, arguments.namespace))
    if arguments.output in ("json", "yaml"):
        sys.stdout.write(_document(found, arguments))
    elif found:
        sys.stdout.write(table(found, utc_now(), wide=arguments.output == "wide"))
    else:
        sys.stderr.write(f"No jobs in namespace {arguments.namespace}, state folder {home.path}.\n")
    return Exit.SUCCEEDED


def table(jobs: list[FineTuneJob], now: datetime, *, wide: bool = False) -> str:
    """Jobs as a table."""
    chosen = COLUMNS + WIDE if wide else COLUMNS
    return columns([name for name, _ in chosen], ([cell(job, now) for _, cell in chosen] for job in jobs))


def find(home: Home, key: JobKey) -> FineTuneJob:
    """A job by its name.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    try:
        job = read_job(home, key)
    except (BrokenFileError, OSError) as error:
        raise UsageError(f"{error}; 'finetune run' of its manifest sets the file aside and goes on") from error
    if job is None:
        names = ", ".join(other.name for other in home.jobs() if other.namespace == key.namespace)
        there = f"there are {names}" if names else "there are none"
        raise UsageError(f"no job {key.name} in namespace {key.namespace} of {home.path}; {there}")
    return job


def as_object(job: FineTuneJob) -> dict[str, Any]:
    """A job as kubectl -o json shows it."""
    value: dict[str, Any] = job.model_dump(mode="json", by_alias=True, exclude_none=True)
    return value


def _document(jobs: list[FineTuneJob], arguments: argparse.Namespace) -> str:
    value: Any = {"apiVersion": "v1", "kind": "List", "items": [as_object(job) for job in jobs]}
    if arguments.name is not None:
        value = as_object(jobs[0])
    if arguments.output == "json":
        return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return yaml_text.dump(value)


def _all(home: Home, namespace: str) -> Iterator[FineTuneJob]:
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
