"""`finetune checkpoints list|verify|diff`: shows, verifies and compares the checkpoints of a job."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from finetune_contract import paths
from finetune_contract.bucket import is_bucket_url
from finetune_operator.cli.checkpoints.bucket import BucketCopy
from finetune_operator.cli.checkpoints.catalog import (
    FoundCheckpoint,
    find_checkpoints,
    find_damage,
    has_checkpoints,
    pick_checkpoint,
)
from finetune_operator.cli.checkpoints.diff import format_difference
from finetune_operator.cli.clock import utc_now
from finetune_operator.cli.commands.get import find_job
from finetune_operator.cli.errors import Exit, UsageError
from finetune_operator.cli.output import formatting
from finetune_operator.cli.output.table import format_columns
from finetune_operator.cluster.local.home import Home
from finetune_operator.cluster.local.jobs import storage_folder
from finetune_operator.cluster.protocol import JobKey


def checkpoints(arguments: argparse.Namespace) -> Exit:
    """Carry out `finetune checkpoints`."""
    if arguments.folder is None or not is_bucket_url(arguments.folder):
        folder = _choose_folder(arguments)
        return _act(arguments, folder, str(folder), lambda _: None)
    with tempfile.TemporaryDirectory(prefix="checkpoints-") as name:
        copy = BucketCopy(arguments.folder, Path(name))
        return _act(arguments, Path(name), arguments.folder, lambda one: copy.download(one.folder.name))


def _act(arguments: argparse.Namespace, folder: Path, label: str, fetch: Callable[[FoundCheckpoint], None]) -> Exit:
    """Carry out the action on a folder.

    Args:
        label: the folder's name in messages.
        fetch: called before any file of a checkpoint other than its manifest is read.
    """
    found = find_checkpoints(folder)
    if arguments.action == "list":
        sys.stdout.write(_format_list(found, utc_now()) if found else f"No checkpoints in {label}.\n")
        return Exit.SUCCEEDED
    picked = [pick_checkpoint(found, name) for name in arguments.names] or [one for one in found if not one.reason]
    for one in picked:
        fetch(one)
    if arguments.action == "verify":
        return _verify(picked)
    sys.stdout.write(format_difference(*picked))
    return Exit.SUCCEEDED


def _choose_folder(arguments: argparse.Namespace) -> Path:
    """Return the folder of the checkpoints: from --folder, or of a job on this machine."""
    if arguments.folder is not None:
        folder = Path(arguments.folder)
        return folder if has_checkpoints(folder) else paths.checkpoints(folder)
    if arguments.name is None:
        raise UsageError("checkpoints: give the name of a job, or a folder with --folder")
    home = Home(arguments.home)
    job = find_job(home, JobKey(arguments.namespace, arguments.name))
    return paths.checkpoints(storage_folder(home, job))


def _format_list(found: list[FoundCheckpoint], now: datetime) -> str:
    rows = []
    for one in found:
        written = None if one.manifest is None else datetime.fromtimestamp(one.manifest.time, UTC)
        size = one.size_bytes
        rows.append(
            (
                one.folder.name,
                str(one.step),
                str(one.attempt),
                "" if size is None else formatting.format_size(size),
                "" if written is None else formatting.format_age(written, now),
                _state(one),
            )
        )
    return format_columns(["NAME", "STEP", "ATTEMPT", "SIZE", "AGE", "STATE"], rows)


def _state(one: FoundCheckpoint) -> str:
    if one.reason is not None:
        return f"corrupt: {one.reason}"
    return "committed" if one.manifest is not None else f"{paths.MANIFEST} is missing or damaged"


def _verify(found: list[FoundCheckpoint]) -> Exit:
    if not found:
        sys.stdout.write("No checkpoints.\n")
        return Exit.SUCCEEDED
    num_damaged = 0
    for one in found:
        damage = find_damage(one)
        num_damaged += damage is not None
        sys.stdout.write(f"{one.folder.name}: {'intact' if damage is None else f'DAMAGED: {damage}'}\n")
        sys.stdout.flush()
    return Exit.FAILED if num_damaged else Exit.SUCCEEDED
