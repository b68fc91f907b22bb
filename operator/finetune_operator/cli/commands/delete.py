"""`finetune delete`: stops a running job gracefully, then deletes the job and its checkpoints."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
from pathlib import Path

from finetune_operator.api.job import FineTuneJob
from finetune_operator.cli.errors import Exit, UsageError
from finetune_operator.cluster.local.files import BrokenFileError
from finetune_operator.cluster.local.home import Home
from finetune_operator.cluster.local.jobs import read_job, remove_job, storage_folder
from finetune_operator.cluster.local.kubelet.processes import send_signal
from finetune_operator.cluster.local.lock import LockedError, hold, holder
from finetune_operator.cluster.protocol import JobKey


def delete(arguments: argparse.Namespace) -> Exit:
    """Carry out `finetune delete`."""
    home = Home(arguments.home)
    key = JobKey(arguments.namespace, arguments.name)
    folder = home.job(key)
    if not folder.path.is_dir():
        raise UsageError(f"no job {key.name} in namespace {key.namespace} of {home.path}")
    runner = holder(folder.lock)
    if runner is not None:
        _print(f"{key.name} is running: waiting for process {runner.pid} to save and stop")
        send_signal(runner, signal.SIGTERM)
    try:
        with hold(folder.lock, wait=True):
            _remove(home, key)
    except LockedError as error:
        raise UsageError(f"another process started job {key.name} again: {error}") from error
    _print(f'finetunejob "{key.name}" deleted')
    return Exit.SUCCEEDED


def _remove(home: Home, key: JobKey) -> None:
    try:
        job = read_job(home, key)
    except BrokenFileError as error:
        _print(f"{error}; checkpoints of the job, if any, remain in {home.storage}")
        job = None
    if job is not None:
        _remove_checkpoints(job, storage_folder(home, job))
    remove_job(home, key)


def _remove_checkpoints(job: FineTuneJob, folder: Path) -> None:
    if folder.is_dir():
        step = f" (newest: step {job.status.last_checkpoint.step})" if job.status.last_checkpoint else ""
        _print(f"deleting its checkpoints{step}: {folder}")
    for output in job.status.outputs:
        if not Path(output.to).is_relative_to(folder):
            _print(f"keeping its output: {output.to}")
    shutil.rmtree(folder, ignore_errors=True)


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
