"""Checks the folders that a job writes to: checkpoint storage, outputs, and the free space of the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from finetune_contract.outputs.spec import OutputSpec
from finetune_operator.api.job import FineTuneJobSpec
from finetune_operator.api.storage import StorageSpec
from finetune_operator.cli.manifest import is_url
from finetune_operator.cluster.local.home import Home

MIN_FREE_BYTES = 256 * 1024**2
"""With less free space, a new checkpoint may not fit next to the previous one."""


def find_storage_problems(storage: StorageSpec | None) -> Iterator[str]:
    """Yield a message for every problem of the checkpoint storage."""
    if storage is None:
        return
    if storage.nfs is not None:
        yield (
            "spec.checkpoint.storage.nfs: a local run cannot mount NFS; mount it yourself and write hostPath, or leave "
            "storage out to use the state folder"
        )
    if storage.host_path is not None:
        path = Path(storage.host_path.path)
        if not path.is_absolute():
            yield f"spec.checkpoint.storage.hostPath.path: {path} is relative; write an absolute path"
        elif reason := _why_not_writable(path):
            yield f"spec.checkpoint.storage.hostPath.path: {reason}; write a folder that you can write to"


def find_output_problems(number: int, output: OutputSpec) -> Iterator[str]:
    """Yield a message if the folder of an output cannot be written."""
    if not is_url(output.to) and (reason := _why_not_writable(Path(output.to))):
        yield f"spec.outputs[{number}].to: {reason}; write a folder that you can write to"


def find_disk_problems(spec: FineTuneJobSpec, home: Home) -> Iterator[str]:
    """Yield a message if the disk of the checkpoints is almost full."""
    storage = spec.checkpoint.storage
    folder, field = home.path, "checkpoint.storage"
    if storage is not None and storage.host_path is not None and storage.host_path.path.startswith("/"):
        folder, field = Path(storage.host_path.path), "checkpoint.storage.hostPath.path"
    free_bytes = shutil.disk_usage(_nearest_existing(folder)).free
    if free_bytes < MIN_FREE_BYTES:
        yield (
            f"spec.{field}: the disk of {folder} has {free_bytes // 1024**2} MiB free, but checkpoints need at least "
            f"{MIN_FREE_BYTES // 1024**2} MiB; free some space or write a folder on another disk"
        )


def _why_not_writable(folder: Path) -> str | None:
    """Return why a folder cannot be created or written to; None if it can."""
    existing = _nearest_existing(folder)
    if not existing.is_dir():
        return f"{existing} is not a folder"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"{existing} is not writable"
    return None


def _nearest_existing(path: Path) -> Path:
    """Return the path itself or its nearest parent that exists."""
    return next(candidate for candidate in (path, *path.parents) if candidate.exists())
