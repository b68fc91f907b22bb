"""`finetune export`: writes outputs from any checkpoint of a job, in a process of the trainer, or lists what exists."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from finetune_contract import paths
from finetune_contract.bucket import is_bucket_url
from finetune_contract.methods import METHODS
from finetune_contract.outputs.spec import OutputFormat
from finetune_operator.api.job import FineTuneJob
from finetune_operator.cli.checkpoints.bucket import BucketCopy
from finetune_operator.cli.checkpoints.catalog import find_checkpoints, has_checkpoints, pick_checkpoint
from finetune_operator.cli.commands.export_on_cluster import export_on_cluster
from finetune_operator.cli.commands.exported import ChosenOutputs, choose_outputs
from finetune_operator.cli.commands.get import find_job
from finetune_operator.cli.errors import Exit, UsageError
from finetune_operator.cli.manifest import load_manifest
from finetune_operator.cli.output import formatting
from finetune_operator.cli.output.table import format_columns
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
    if arguments.cluster:
        return export_on_cluster(arguments)
    home = Home(arguments.home)
    try:
        job, folder = choose_job(arguments, home)
    except UsageError as error:
        raise UsageError(f"{error}, or write --cluster: the operator exports it in a pod") from error
    if arguments.list:
        return _list(job, folder)
    chosen = _choose_outputs(arguments, job)
    cache = home.claim(CACHE_CLAIM)
    state = Path(folder) if _is_job_folder(folder) else cache / "exports" / (job.metadata.uid or job.metadata.name)
    with (
        open_checkpoint(folder, arguments.step, state) as checkpoint,
        tempfile.TemporaryDirectory(prefix="export-") as name,
    ):
        run = Path(name) / "run.json"
        run.write_text(build_run_spec(job).to_json(), encoding="utf-8")
        listed = json.dumps(
            [output.model_dump(mode="json", by_alias=True, exclude_defaults=True) for output in chosen.outputs]
        )
        command = [sys.executable, "-m", MODULE, str(run), str(checkpoint), listed, str(state), str(cache)]
        if arguments.dry_run:
            command.append("--dry-run")
        lines = run_trainer(command, chosen)
        if lines is None:
            return Exit.FAILED
        for output in chosen.outputs if arguments.dry_run else ():
            sys.stdout.write(f"{checkpoint.name}: would write {output.format} to {output.to}\n")
        for line in lines:
            written = json.loads(line)
            size = formatting.format_size(written["sizeBytes"])
            sys.stdout.write(f"{checkpoint.name}: wrote {written['format']} to {written['to']} ({size})\n")
    return Exit.SUCCEEDED


def _is_job_folder(location: str) -> bool:
    return not is_bucket_url(location) and paths.checkpoints(Path(location)).is_dir()


def _list(job: FineTuneJob, location: str) -> Exit:
    """Print what can be exported, and what has been written."""
    header = ("CHECKPOINT", "STEP", "SIZE", "STATE")
    with _local_checkpoints(location) as (folder, _):
        rows = [
            (
                one.folder.name,
                str(one.step),
                "" if one.size_bytes is None else formatting.format_size(one.size_bytes),
                "complete" if one.reason is None and one.manifest is not None else "damaged",
            )
            for one in find_checkpoints(folder)
        ]
    sys.stdout.write(format_columns(header, rows))
    if job.status.outputs:
        written = (
            (output.format, output.state.value, formatting.format_size(output.bytes), output.to)
            for output in job.status.outputs
        )
        sys.stdout.write("\n" + format_columns(("FORMAT", "STATE", "SIZE", "TO"), written))
    method = job.spec.training.method
    if method is not None:
        sys.stdout.write(f"\nFormats: {', '.join(sorted(METHODS[method].formats))}\n")
    return Exit.SUCCEEDED


def choose_job(arguments: argparse.Namespace, home: Home) -> tuple[FineTuneJob, str]:
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


def _choose_outputs(arguments: argparse.Namespace, job: FineTuneJob) -> ChosenOutputs:
    """Return the requested outputs, with absolute folders or URLs.

    Raises:
        UsageError: the method cannot write the format, or it is not known where to write to.
    """
    method = job.spec.training.method
    chosen = OutputFormat(arguments.format) if arguments.format else None
    if method is not None and chosen is not None and chosen not in METHODS[method].formats:
        known = ", ".join(sorted(METHODS[method].formats))
        raise UsageError(f"--format: {method.value} cannot be written as {chosen.value}; write one of {known}")
    return choose_outputs(
        arguments,
        job,
        lambda to: to if "://" in to else str(Path(to).expanduser().absolute()),
        lambda output: "://" in output.to or Path(output.to).is_absolute(),
    )


def run_trainer(command: Sequence[str], chosen: ChosenOutputs) -> list[str] | None:
    """Run a process of the trainer, and show its log with the names of fields as the user has written them.

    Returns:
        The lines of its output; None if it fails.
    """
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as written,
        subprocess.Popen(
            command, env=machine_environment(), stdout=written, stderr=subprocess.PIPE, text=True, errors="replace"
        ) as process,
    ):
        assert process.stderr is not None
        for line in process.stderr:
            sys.stderr.write(chosen.name_fields(line))
            sys.stderr.flush()
        if process.wait():
            return None
        written.seek(0)
        return written.read().splitlines()


@contextlib.contextmanager
def open_checkpoint(location: str, step: int | None, state: Path | None = None) -> Iterator[Path]:
    """Yield the folder of the newest checkpoint, or of that of a step; from a bucket, it is downloaded first.

    Args:
        location: the job's folder, or the URL of its folder in a bucket.
        step: the step; None: the newest.
        state: from a bucket, receives the validation pictures of the step; None: they are not needed.

    Raises:
        UsageError: there is none.
    """
    with _local_checkpoints(location) as (folder, copy):
        found = [one for one in find_checkpoints(folder) if one.reason is None and one.manifest is not None]
        if not found:
            raise UsageError(f"{location} contains no complete checkpoint")
        picked = pick_checkpoint(found, str(step)) if step is not None else found[0]
        if copy is not None:
            copy.download(picked.folder.name)
            if state is not None:
                copy.download_pictures(picked.step, state)
        yield picked.folder


@contextlib.contextmanager
def _local_checkpoints(location: str) -> Iterator[tuple[Path, BucketCopy | None]]:
    """Yield the folder with the manifests of all checkpoints; if they are in a bucket, also what completes one."""
    if not is_bucket_url(location):
        folder = Path(location)
        yield (folder if has_checkpoints(folder) else paths.checkpoints(folder)), None
        return
    with tempfile.TemporaryDirectory(prefix="checkpoints-") as name:
        yield Path(name), BucketCopy(location, Path(name))
