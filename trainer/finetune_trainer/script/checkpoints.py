"""The checkpoints of a script: folders in accelerate's own format, committed by a manifest inside each of them.

A folder without a manifest is incomplete and does not count. The manifest names the SHA-256 of every file, so the
newest folder that is verified against its manifest is resumed. Older ones are deleted only after a newer one is
committed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_contract import paths
from finetune_contract.manifest import (
    BadCheckpointError,
    FileEntry,
    ForeignCheckpointError,
    Manifest,
    read_manifest,
    verify,
    verify_file,
)
from finetune_trainer.checkpoint.store.fence import Fence
from finetune_trainer.files import sync_file, sync_folder, write_atomically

_LOG = logging.getLogger(__name__)
WRITING = ".writing-"
DELETING = ".deleting-"
SURVIVORS = ".survivors"
"""Suffix of the temporary folder of an emergency save."""
RECORD = "finetune.json"
"""File, inside a checkpoint, that describes why it was taken."""
NUMBERED = re.compile(r"checkpoint[-_](\d+)$")
"""Names that diffusers' scripts and accelerate give to checkpoints."""
_TEMPORARY = re.compile(rf"^(?:{re.escape(WRITING)}|{re.escape(DELETING)})(.*?)(?:-a\d+(?:{re.escape(SURVIVORS)})?)?$")
BY_SCRIPT = "script"
NUM_STREAMS = 4

remove_tree = shutil.rmtree
"""The original function: the hook replaces that of the script."""


@dataclass(frozen=True)
class Found:
    """A verified checkpoint."""

    folder: Path
    manifest: Manifest


class ScriptCheckpoints:
    """The checkpoints in a script's output folder, as one attempt sees them.

    Args:
        folder: output folder of the script.
        job_uid: only checkpoints of this job count.
        attempt: number of this attempt.
        fence: of the job.
        keep: number of newest checkpoints to keep; those that the script itself saves are left to the script.
    """

    def __init__(self, folder: Path, job_uid: str, attempt: int, fence: Fence, keep: int) -> None:
        self.folder = folder
        self._job_uid = job_uid
        self._attempt = attempt
        self._fence = fence
        self._keep = keep
        self.num_corrupt = 0

    def open(self) -> None:
        """Mark the attempt, and remove the leftovers of killed saves.

        Raises:
            SupersededError: a newer attempt has begun.
            OSError: the storage cannot be written.
        """
        self._fence.mark()
        self.folder.mkdir(parents=True, exist_ok=True)
        for entry in list(self.folder.iterdir()):
            if not entry.name.startswith((WRITING, DELETING)):
                continue
            final = entry.with_name(_TEMPORARY.sub(r"\1", entry.name))
            if not final.exists() and self._is_intact(entry):
                # The attempt was killed between the two renames that replace a checkpoint.
                entry.rename(final)
            else:
                remove_tree(entry, ignore_errors=True)

    def _is_intact(self, folder: Path) -> bool:
        try:
            verify(folder, self._job_uid)
        except BadCheckpointError:
            return False
        return True

    def find_newest(self) -> Found | None:
        """Return the newest verified checkpoint. Damaged and incomplete ones are renamed and kept."""
        for folder, manifest in self.committed():
            try:
                return Found(folder, verify(folder, self._job_uid))
            except ForeignCheckpointError as error:
                _LOG.warning("checkpoint %s is skipped: %s", folder.name, error)
            except BadCheckpointError as error:
                self._set_aside(folder, str(error))
                _LOG.warning("checkpoint of step %d is damaged: %s", manifest.step, error)
        return None

    def set_aside_incomplete(self, except_for: str = "") -> None:
        """Rename folders that have the name of a checkpoint and no manifest, except for one that the user names."""
        for entry in sorted(self.folder.iterdir()):
            is_named = except_for.rstrip("/").rpartition("/")[2] == entry.name
            if NUMBERED.fullmatch(entry.name) and not is_named and not is_committed(entry):
                self._set_aside(entry, f"{paths.MANIFEST} is missing: the save was not completed")

    def committed(self) -> list[tuple[Path, Manifest]]:
        """Return the folders that have a readable manifest of this job, newest first."""
        found = []
        for entry in self.folder.iterdir():
            if entry.name.startswith(".") or not is_committed(entry):
                continue
            if entry.name.startswith(paths.CORRUPT):
                continue
            try:
                manifest = read_manifest(entry)
            except BadCheckpointError as error:
                if not isinstance(error, ForeignCheckpointError):
                    self._set_aside(entry, str(error))
                continue
            if manifest.job_uid == self._job_uid:
                found.append((entry, manifest))
        return sorted(found, key=lambda each: (each[1].step, each[1].attempt, each[1].time), reverse=True)

    def aside(self, final: Path) -> Path:
        """Return the temporary folder of a checkpoint: the same on all ranks, and new in each attempt."""
        return final.with_name(f"{WRITING}{final.name}-a{self._attempt}")

    def commit(self, written: Path, final: Path, step: int, time: float, record: dict[str, Any]) -> Found:
        """Hash all files durably, write the manifest, and give the folder its name.

        Raises:
            SupersededError: a newer attempt has begun.
            OSError: the storage cannot be written.
            BadCheckpointError: the storage returns other data than was written.
        """
        write_atomically(written / RECORD, json.dumps(record).encode())
        files = _hash_files(written)
        manifest = Manifest(job_uid=self._job_uid, attempt=self._attempt, step=step, time=time, files=files).sealed()
        self._fence.check()
        write_atomically(written / paths.MANIFEST, manifest.model_dump_json(indent=1).encode())
        if written != final:
            publish(written, final)
        return Found(final, manifest)

    def prune(self, newest: Path, requested: list[Path]) -> None:
        """Delete what the script has asked to delete, and the hook's own checkpoints beyond the number to keep.

        Args:
            newest: the checkpoint that was committed just now.
            requested: folders that the script has asked to delete.

        Raises:
            SupersededError: a newer attempt has begun.
        """
        self._fence.check()
        for folder in requested:
            if folder != newest:
                delete(folder)
        for folder, _ in self.committed()[self._keep :]:
            if folder != newest and record_of(folder).get("by", BY_SCRIPT) != BY_SCRIPT:
                delete(folder)

    def claim(self, final: Path) -> bool:
        """Return whether this rank is the first one that claims the emergency save of a step."""
        try:
            self.aside(final).with_suffix(".claim").mkdir(parents=True)
        except FileExistsError:
            return False
        return True

    def _set_aside(self, folder: Path, why: str) -> None:
        self.num_corrupt += 1
        number = 1
        while (target := folder.with_name(f"{paths.CORRUPT}{folder.name}-{number}")).exists():
            number += 1
        with contextlib.suppress(OSError):
            write_atomically(folder / paths.CORRUPT_REASON, f"{why}\n".encode())
        with contextlib.suppress(OSError):
            folder.rename(target)


def is_committed(folder: Path) -> bool:
    """Return whether a folder has a manifest."""
    return (folder / paths.MANIFEST).is_file()


def record_of(folder: Path) -> dict[str, Any]:
    """Return why a checkpoint was taken; empty if that cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return record if isinstance(record, dict) else {}
    return {}


def publish(written: Path, final: Path) -> None:
    """Give a complete folder its name. Files that the script has put into a folder of that name are kept."""
    if final.exists():
        if not is_committed(final):
            for entry in final.iterdir():
                if not (written / entry.name).exists():
                    entry.rename(written / entry.name)
        delete(final)
    written.rename(final)
    sync_folder(final.parent)


def delete(folder: Path) -> None:
    """Rename a folder, so that it no longer counts, then delete it."""
    temporary = folder.with_name(f"{DELETING}{folder.name}")
    remove_tree(temporary, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(temporary)
    remove_tree(temporary, ignore_errors=True)


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.relative_to(folder) != Path(paths.MANIFEST):
            yield path


def _hash_files(folder: Path) -> tuple[FileEntry, ...]:
    """Make all files durable, and return their names, sizes and hashes. Each is read back from the disk."""

    def entry(path: Path) -> FileEntry:
        sync_file(path)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found = FileEntry(name=path.relative_to(folder).as_posix(), size_bytes=path.stat().st_size, sha256=digest)
        verify_file(folder, found, from_disk=True)
        return found

    with ThreadPoolExecutor(min(NUM_STREAMS, os.cpu_count() or 1)) as pool:
        files = tuple(pool.map(entry, _files(folder)))
    for each in {folder, *(path.parent for path in _files(folder))}:
        sync_folder(each)
    return files
