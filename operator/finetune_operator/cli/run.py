"""`finetune run`: a manifest from here to its end, with the same core that a cluster would run it with."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

from finetune_operator.api.job import FineTuneJob, FineTuneJobSpec, Phase
from finetune_operator.build import num_nodes
from finetune_operator.cli import preflight, words
from finetune_operator.cli.clock import utc_now
from finetune_operator.cli.errors import Exit, UsageError
from finetune_operator.cli.manifest import describe_difference, load_manifest
from finetune_operator.cli.out import tell
from finetune_operator.cli.plain import PlainView
from finetune_operator.cli.view import LiveView
from finetune_operator.cluster.local import jobs
from finetune_operator.cluster.local.cluster import key_of, with_spec
from finetune_operator.cluster.local.faults import Fault, FaultKind, parse_fault
from finetune_operator.cluster.local.home import Home
from finetune_operator.cluster.local.lock import LockedError, hold
from finetune_operator.cluster.local.runner import FINISHED, LocalRun
from finetune_operator.cluster.reconcile import Pass

MUTABLE = ("suspend", "recovery", "activeDeadlineSeconds", "ttlSecondsAfterFinished", "priorityClassName")
"""Fields of spec that may differ from one `finetune run` to the next of the same job."""


View = PlainView | LiveView


def run(arguments: argparse.Namespace) -> Exit:
    """Carry out `finetune run`."""
    manifest = load_manifest(arguments.file, arguments.set)
    home = Home(arguments.home)
    faults = read_faults(arguments, manifest.spec)
    if sentences := preflight.check(manifest, home, preflight.this_machine()):
        raise UsageError("\n".join(f"{arguments.file}: {sentence}" for sentence in sentences))
    key = key_of(manifest)
    _check_home(home)
    try:
        with hold(home.job(key).lock):
            return _run_locked(arguments, home, manifest, faults)
    except LockedError as error:
        who = f"process {error.holder.pid}" if error.holder else "another process"
        raise UsageError(
            f"job {key.name} is being run by {who}; look at it with 'finetune get {key.name}' and "
            f"'finetune logs -f {key.name}'"
        ) from error


def read_faults(arguments: argparse.Namespace, spec: FineTuneJobSpec) -> list[Fault]:
    """The faults that the command line asks for.

    Raises:
        UsageError: one cannot be read, or names a rank that there is not.
    """
    try:
        faults = [parse_fault(FaultKind.PREEMPT, text) for text in arguments.preempt]
        faults += [parse_fault(FaultKind.KILL, text) for text in arguments.kill]
    except ValueError as error:
        raise UsageError(str(error)) from error
    num_ranks = num_nodes(spec) * spec.topology.processes_per_node
    for fault in faults:
        if fault.rank >= num_ranks:
            raise UsageError(f"--{fault.kind}: there is no rank {fault.rank}; the job's ranks are 0 to {num_ranks - 1}")
    return faults


def _check_home(home: Home) -> None:
    try:
        home.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--home: {home.path} cannot be made or used ({error.strerror}); write a folder that you may write to"
        ) from error
    if not os.access(home.path, os.W_OK | os.X_OK):
        raise UsageError(f"--home: {home.path} may not be written to; write another folder")


def _run_locked(arguments: argparse.Namespace, home: Home, manifest: FineTuneJob, faults: list[Fault]) -> Exit:
    job = _take_or_create(home, manifest)
    if job.status.phase in FINISHED:
        return _already_finished(job)
    plain = arguments.plain or not sys.stdout.isatty()
    view: View = PlainView(job.status, utc_now) if plain else LiveView(job.status, utc_now)
    with view as audience:
        for sentence in preflight.remarks(manifest.spec):
            audience.warn(sentence)
        audience.say(_headline(job, home))
        local_run = LocalRun(home, job, audience, utc_now)
        local_run.plan_faults(faults)
        seen = asyncio.run(_run_to_end(local_run, audience))
    return _conclude(seen, home, arguments.file)


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


def _take_or_create(home: Home, manifest: FineTuneJob) -> FineTuneJob:
    """The job as stored, brought up to the manifest, or a new one."""
    stored = jobs.take_job(home, key_of(manifest), _warn)
    if stored is None:
        return jobs.create_job(home, manifest, utc_now)
    old = stored.spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    new = manifest.spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    if differences := list(describe_difference(_fixed(old), _fixed(new))):
        name = stored.metadata.name
        raise UsageError(
            f"job {name} exists with another spec: {'; '.join(differences)}. "
            f"Give the new one another metadata.name, or remove the old one: finetune delete {name}"
        )
    if old != new:
        stored = with_spec(stored, manifest.spec)
        jobs.store_job(home.job(key_of(stored)), stored)
    return stored


def _fixed(spec: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in spec.items() if name not in MUTABLE}


def _already_finished(job: FineTuneJob) -> Exit:
    name, phase = job.metadata.name, job.status.phase
    tell(sys.stdout, f"{name} has {phase} already: {job.status.message or ''}\n")
    tell(sys.stdout, f"To run it anew: finetune delete {name}, then this command again.\n")
    return Exit.SUCCEEDED if phase is Phase.SUCCEEDED else Exit.FAILED


def _headline(job: FineTuneJob, home: Home) -> str:
    """What is run, in a line."""
    topology = job.spec.topology
    nodes = words.plural(num_nodes(job.spec), "node")
    ranks = words.plural(topology.processes_per_node, "rank")
    checkpoint = job.status.last_checkpoint
    begun = f", going on from step {checkpoint.step}" if checkpoint else ""
    what = f"{words.method(job)} on {nodes} of {ranks} ({topology.accelerator}){begun}"
    return f"{job.metadata.name}: {what}; state in {home.path}"


def _conclude(seen: Pass, home: Home, file: Path) -> Exit:
    """The last line: how it ended, how long it took, what it lost, where the outputs are."""
    job = seen.job
    if job is None:
        tell(sys.stdout, "the job was deleted: its time to live was over\n")
        return Exit.SUCCEEDED
    name, status = job.metadata.name, job.status
    if status.phase is Phase.SUCCEEDED:
        outputs = ", ".join(output.to for output in status.outputs) or str(jobs.storage_folder(home, job))
        tell(sys.stdout, f"{name} Succeeded in {_took(job)}: {_tally(job)}; outputs in {outputs}\n")
        return Exit.SUCCEEDED
    if status.phase is Phase.FAILED:
        tell(sys.stdout, f"{name} Failed after {_took(job)}: {status.message} ({_tally(job)})\n")
        tell(sys.stdout, f"Its logs: finetune logs {name}\n")
        return Exit.FAILED
    step = status.last_checkpoint.step if status.last_checkpoint else 0
    where = f"at step {step}, which is saved" if step else "before its first checkpoint"
    tell(sys.stdout, f"{name} is suspended {where}; the same command goes on: finetune run {file}\n")
    return Exit.INTERRUPTED


def _took(job: FineTuneJob) -> str:
    status = job.status
    if status.start_time is None:
        return "no time"
    return words.seconds((status.completion_time or utc_now()) - status.start_time)


def _tally(job: FineTuneJob) -> str:
    status = job.status
    # An attempt that was suspended was no restart.
    num_restarts = status.preemptions + status.failures
    parts = [f"{words.steps(status)} steps" if status.step is not None else "no step"]
    parts.append(
        f"{words.plural(num_restarts, 'restart')} ({words.plural(status.preemptions, 'preemption')}, "
        f"{words.plural(status.failures, 'failure')})"
    )
    parts.append(f"{words.plural(status.lost_steps, 'step')} lost")
    return ", ".join(parts)


def _warn(sentence: str) -> None:
    tell(sys.stderr, f"finetune: warning: {sentence}\n")
