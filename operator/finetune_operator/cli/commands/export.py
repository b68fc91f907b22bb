"""`finetune export`: writes an output from any checkpoint of a job, in a process of the trainer."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from finetune_contract import paths
from finetune_contract.bucket import is_bucket_url
from finetune_contract.methods import METHODS
from finetune_contract.spec import OutputFormat
from finetune_operator.api.job import FineTuneJob
from finetune_operator.cli.checkpoints.bucket import BucketCopy
from finetune_operator.cli.checkpoints.catalog import find_checkpoints, has_checkpoints, pick_checkpoint
from finetune_operator.cli.commands.get import find_job
from finetune_operator.cli.errors import Exit, UsageError
from finetune_operator.cli.manifest import load_manifest
from finetune_operator.cli.output import formatting
from finetune_operator.cluster.local.home import CACHE_CLAIM, Home
from finetune_operator.cluster.local.jobs import storage_folder
from finetune_operator.cluster.local.kubelet.launch import machine_environment
from finetune_operator.cluster.protocol import JobKey
from finetune_operator.manifests import build_run_spec

MODULE = "finetune_trainer.export.from_checkpoint"
REMOTE = (
    "for a job on a cluster, give its manifest and --folder, in a pod that mounts the job's storage or on a machine "
    "that can read its bucket (docs/checkpoints.md)"
)


def export(arguments: argparse.Namespace) -> Exit:
    """Carry out `finetune export`."""
    home = Home(arguments.home)
    job, folder = _choose(arguments, home)
    output = _choose_format(arguments, job)
    with _checkpoint(folder, arguments.step) as checkpoint, tempfile.TemporaryDirectory(prefix="export-") as name:
        run = Path(name) / "run.json"
        run.write_text(build_run_spec(job).to_json(), encoding="utf-8")
        to = str(Path(arguments.to).expanduser().absolute())
        command = [sys.executable, "-m", MODULE, str(run), str(checkpoint), output, to, str(home.claim(CACHE_CLAIM))]
        result = subprocess.run(command, env=machine_environment(), stdout=subprocess.PIPE, text=True, check=False)
        if result.returncode:
            return Exit.FAILED
        written = json.loads(result.stdout.splitlines()[-1])
        size = formatting.format_size(written["sizeBytes"])
        sys.stdout.write(f"{checkpoint.name}: wrote {output} to {to} ({size})\n")
    return Exit.SUCCEEDED


def _choose(arguments: argparse.Namespace, home: Home) -> tuple[FineTuneJob, str]:
    """Return the job, and the folder or URL of its checkpoints.

    Raises:
        UsageError: the job does not exist on this machine.
    """
    path = Path(arguments.job)
    if path.is_file():
        manifest = load_manifest(path, arguments.set)
        if arguments.folder is not None:
            return manifest, arguments.folder
        key = JobKey(manifest.metadata.namespace, manifest.metadata.name)
    else:
        key = JobKey(arguments.namespace, arguments.job)
    try:
        stored = find_job(home, key)
    except UsageError as error:
        raise UsageError(f"{error}; {REMOTE}") from error
    return stored, arguments.folder or _storage_of(stored, home)


def _storage_of(job: FineTuneJob, home: Home) -> str:
    storage = job.spec.checkpoint.storage
    if storage is None or storage.bucket is None:
        return str(storage_folder(home, job))
    meta = job.metadata
    return f"{storage.bucket.url.rstrip('/')}/{paths.job_folder(meta.namespace, meta.name, meta.uid)}"


def _choose_format(arguments: argparse.Namespace, job: FineTuneJob) -> str:
    """Return the requested format; by default that of the job's first output.

    Raises:
        UsageError: the method cannot write it.
    """
    method, outputs = job.spec.training.method, job.spec.outputs
    default = outputs[0].format if outputs else OutputFormat.DIFFUSERS
    chosen = arguments.format or default.value
    if method is not None and chosen not in METHODS[method].formats:
        known = ", ".join(sorted(METHODS[method].formats))
        raise UsageError(f"--format: {method.value} cannot be written as {chosen}; write one of {known}")
    return chosen


@contextlib.contextmanager
def _checkpoint(location: str, step: int | None) -> Iterator[Path]:
    """Yield the folder of the newest checkpoint, or of that of a step; from a bucket, it is downloaded first.

    Raises:
        UsageError: there is none.
    """
    if not is_bucket_url(location):
        folder = Path(location)
        yield _pick(folder if has_checkpoints(folder) else paths.checkpoints(folder), location, step)
        return
    with tempfile.TemporaryDirectory(prefix="checkpoints-") as name:
        copy = BucketCopy(location, Path(name))
        picked = _pick(Path(name), location, step)
        copy.download(picked.name)
        yield picked


def _pick(folder: Path, location: str, step: int | None) -> Path:
    found = [one for one in find_checkpoints(folder) if one.reason is None and one.manifest is not None]
    if not found:
        raise UsageError(f"{location} contains no complete checkpoint")
    return (pick_checkpoint(found, str(step)) if step is not None else found[0]).folder
