"""`finetune run`: makes all checks before anything starts, then calls `drive`."""

from __future__ import annotations

import argparse
import os
import sys

from finetune_contract.phase import Phase
from finetune_operator.api.job import FineTuneJob, FineTuneJobSpec
from finetune_operator.api.rules.edits import LIMITED, fixed_part, forbidden_edits, keep_earlier_defaults
from finetune_operator.cli.clock import utc_now
from finetune_operator.cli.errors import Exit, UsageError
from finetune_operator.cli.manifest import describe_difference, load_manifest
from finetune_operator.cli.output.streams import write_flushed
from finetune_operator.cli.preflight.check import find_problems, measure_machine
from finetune_operator.cluster.local import jobs
from finetune_operator.cluster.local.faults import FaultKind, PlannedFault, parse_fault, parse_room
from finetune_operator.cluster.local.home import Home
from finetune_operator.cluster.local.lock import LockedError, hold
from finetune_operator.manifests import num_nodes
from finetune_operator.plan.policies.retry import continued


def run(arguments: argparse.Namespace) -> Exit:
    """Carry out `finetune run`."""
    manifest = load_manifest(arguments.file, arguments.set)
    home = Home(arguments.home)
    faults = read_faults(arguments, manifest.spec)
    if problems := find_problems(manifest, home, measure_machine()):
        raise UsageError("\n".join(f"{arguments.file}: {problem}" for problem in problems))
    key = jobs.key_of(manifest)
    _check_home(home)
    try:
        with hold(home.job(key).lock):
            return _run_locked(arguments, home, manifest, faults)
    except LockedError as error:
        owner = f"process {error.holder.pid}" if error.holder else "another process"
        raise UsageError(
            f"{owner} is already running job {key.name}; follow it with 'finetune get {key.name}' and "
            f"'finetune logs -f {key.name}'"
        ) from error


def read_faults(arguments: argparse.Namespace, spec: FineTuneJobSpec) -> list[PlannedFault]:
    """Return the faults that the command line requests.

    Raises:
        UsageError: a fault cannot be parsed, or its rank does not exist.
    """
    try:
        faults = [parse_fault(FaultKind.PREEMPT, text) for text in arguments.preempt]
        faults += [parse_fault(FaultKind.KILL, text) for text in arguments.kill]
        faults += [parse_room(text) for text in arguments.room]
    except ValueError as error:
        raise UsageError(str(error)) from error
    num_ranks = num_nodes(spec) * spec.topology.processes_per_node
    for fault in faults:
        if fault.rank >= num_ranks and fault.kind is not FaultKind.ROOM:
            raise UsageError(
                f"--{fault.kind}: rank {fault.rank} does not exist; the job's ranks are 0 to {num_ranks - 1}"
            )
    return faults


def _check_home(home: Home) -> None:
    try:
        home.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--home: {home.path} cannot be created or used ({error.strerror}); write a folder that you can write to"
        ) from error
    if not os.access(home.path, os.W_OK | os.X_OK):
        raise UsageError(f"--home: {home.path} is not writable; write another folder")


def _run_locked(arguments: argparse.Namespace, home: Home, manifest: FineTuneJob, faults: list[PlannedFault]) -> Exit:
    job = _load_or_create(home, manifest)
    if job.status.phase is Phase.SUCCEEDED:
        return _report_success(job)
    if job.status.phase is Phase.FAILED:
        job = _continue_failed(home, job)
    # Imported late: its HTTP server takes longer to import than the checks above take to refuse a job.
    from finetune_operator.cli.drive import drive_job  # noqa: PLC0415

    return drive_job(job, home, faults, plain=arguments.plain, file=arguments.file)


def _load_or_create(home: Home, manifest: FineTuneJob) -> FineTuneJob:
    """Return the stored job, updated to the manifest, or a new one."""
    stored = jobs.load_job(home, jobs.key_of(manifest), _warn)
    if stored is None:
        return jobs.create_job(home, manifest, utc_now)
    manifest = keep_earlier_defaults(stored, manifest)
    old = stored.spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    new = manifest.spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    if forbidden := forbidden_edits(stored, manifest):
        differences = [
            *describe_difference(fixed_part(old), fixed_part(new)),
            *(f"{fixed.path}: {fixed.problem}" for fixed in forbidden if fixed.path in LIMITED),
        ]
        name = stored.metadata.name
        raise UsageError(
            f"job {name} already exists with a different spec: {'; '.join(differences)}. "
            f"Give the new job another metadata.name, or delete the old one: finetune delete {name}"
        )
    if old != new:
        stored = jobs.with_spec(stored, manifest.spec)
        jobs.store_job(home.job(jobs.key_of(stored)), stored)
    return stored


def _report_success(job: FineTuneJob) -> Exit:
    name = job.metadata.name
    write_flushed(sys.stdout, f"{name} has already Succeeded: {job.status.message or ''}\n")
    write_flushed(sys.stdout, f"To run it again: finetune delete {name}, then repeat this command.\n")
    return Exit.SUCCEEDED


def _continue_failed(home: Home, job: FineTuneJob) -> FineTuneJob:
    """Return a job that has Failed, ready for another attempt, and store it."""
    name, status = job.metadata.name, job.status
    write_flushed(sys.stdout, f"{name} Failed before: {status.message or ''}\n")
    step = status.last_checkpoint.step if status.last_checkpoint else 0
    write_flushed(
        sys.stdout, f"{name} continues from step {step}; to start from the beginning: finetune delete {name}\n"
    )
    job = job.model_copy(update={"status": continued(status, utc_now())})
    jobs.store_job(home.job(jobs.key_of(job)), job)
    return job


def _warn(message: str) -> None:
    write_flushed(sys.stderr, f"finetune: warning: {message}\n")
