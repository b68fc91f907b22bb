"""Delivers an output to a folder of a volume.

The files are written next to the folder, on the same file system. If the folder does not exist or is empty, it appears
by one rename. Otherwise the complete files are renamed into it one after another.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from finetune_trainer import patience
from finetune_trainer.delivery.claims import FolderClaims, conflict_message
from finetune_trainer.delivery.staged import OutputFile, OutputRecord, StagedOutput, describe_file
from finetune_trainer.delivery.target import ExportStage, OnExportStage, TransferProgress
from finetune_trainer.errors import ConfigError, StorageError
from finetune_trainer.files import sync_file, sync_folder

PERMANENT = frozenset(
    {
        errno.EACCES,
        errno.EEXIST,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOTDIR,
        errno.EPERM,
    }
)
"""Errors that remain until somebody changes the path or its permissions; others, such as a full disk, may pass.

A kernel also makes a file system read-only after an error of its disk: on another node, the next attempt can succeed.
"""
_NOT_RENAMED = frozenset({errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY, errno.EXDEV, errno.EINVAL, errno.ENOTDIR})
WRITING = ".writing"
"""End of the name of the folder in which an output is written."""


class FolderTarget:
    """A folder; see `Target`.

    Args:
        field: field of the manifest, for messages.
        folder: the folder.
        job: namespace and name of the job; None if nobody else writes to the folder.
    """

    def __init__(self, field: str, folder: Path, job: tuple[str, str] | None) -> None:
        self.location = str(folder)
        self._field = field
        self._folder = folder
        self._claims = None if job is None else FolderClaims(folder, *job)

    def check(self, names: Sequence[str]) -> None:
        """Create and remove a file in the folder, and look for files of others; a missing folder is removed again.

        Raises:
            ConfigError: the path or its permissions are wrong, or a file of somebody else would be replaced.
            StorageError: the file system is read-only.
        """
        try:
            created = _missing(self._folder)
            self._folder.mkdir(parents=True, exist_ok=True)
            probe = self._folder / f".probe-{secrets.token_hex(8)}"
            probe.touch(exist_ok=False)
            with contextlib.suppress(OSError):
                probe.unlink()
                for folder in created:
                    folder.rmdir()
            conflict = self._find_conflict(names)
        except OSError as error:
            if error.errno in PERMANENT:
                raise self._refused(error) from error
            if error.errno == errno.EROFS:
                raise StorageError(f"{self._field}: cannot write to {self._folder}: {error.strerror}") from error
            return
        self._refuse(conflict)

    def staging_folder(self, key: str) -> Path:
        """Return where to write an output, so that delivering it copies nothing. Its parent exists.

        Raises:
            OSError: the folder cannot be created.
        """
        parent = self._folder.parent
        parent.mkdir(parents=True, exist_ok=True)
        mount = self._folder.is_dir() and self._folder.stat().st_dev != parent.stat().st_dev
        if mount or not os.access(parent, os.W_OK | os.X_OK):
            return self._folder / f".{key}{WRITING}"
        return parent / f".{self._folder.name or 'outputs'}.{key}{WRITING}"

    def holds(self, record: OutputRecord) -> bool:
        """Compare the contents of all files."""
        return all(self.has(file) for file in record.files)

    def has(self, file: OutputFile) -> bool:
        """Return whether the folder contains a file, with the same contents."""
        path = self._folder / file.name
        try:
            return path.stat().st_size == file.size_bytes and describe_file(path, file.name) == file
        except OSError:
            return False

    def deliver(self, output: StagedOutput, on_stage: OnExportStage, progress: TransferProgress) -> None:
        """Rename the files, or copy them if they are on another file system or are still needed."""
        total = output.record.size_bytes
        try:
            # Equal files are not replaced.
            changed = [file.name for file in output.record.files if self._claims is not None and not self.has(file)]
            self._refuse(self._find_conflict(changed) if changed else "")
            source = self.staging_folder(output.key)
            if source != output.folder:
                patience.wait_out(f"{self._field}: copying to {self._folder}", lambda: _copy(output, source))
            on_stage(ExportStage.UPLOADED)
            self._publish(output, source, on_stage)
        except OSError as error:
            if error.errno in PERMANENT:
                raise self._refused(error) from error
            raise StorageError(f"{self._field}: cannot write to {self._folder}: {error.strerror or error}") from error
        progress(total, total)

    def _publish(self, output: StagedOutput, source: Path, on_stage: OnExportStage) -> None:
        names = [file.name for file in output.record.files]
        if self._claims is not None:
            self._claims.write(names, source)
        try:
            source.rename(self._folder)
        except OSError as error:
            if error.errno not in _NOT_RENAMED or not self._folder.is_dir():
                raise
            # Before the files: an attempt that is killed in between has a claim to those that it has renamed.
            if self._claims is not None:
                self._claims.write(names)
            for file in output.record.files:
                target = self._folder / file.name
                if not (source / file.name).exists() and self.has(file):
                    # An earlier export has renamed it.
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                (source / file.name).replace(target)
                on_stage(ExportStage.PUBLISH)
            shutil.rmtree(source)
            sync_folder(self._folder)
        sync_folder(self._folder.parent)

    def _find_conflict(self, names: Sequence[str]) -> str:
        return "" if self._claims is None else self._claims.find_conflict(names)

    def _refuse(self, conflict: str) -> None:
        if conflict:
            raise ConfigError(conflict_message(self._field, self.location, conflict))

    def _refused(self, error: OSError) -> ConfigError:
        reason = "a file has this name" if error.errno == errno.EEXIST else error.strerror
        return ConfigError(
            f"{self._field}: cannot write to {self._folder}: {reason}; write a folder that the trainer can write to, "
            "or a relative path for a folder in the job's own folder"
        )


def _missing(folder: Path) -> list[Path]:
    """Return the folder and its parents that do not exist, the innermost first."""
    found = []
    for each in (folder, *folder.parents):
        if os.path.lexists(each):
            break
        found.append(each)
    return found


def _copy(output: StagedOutput, source: Path) -> None:
    """Copy the files that are missing in `source`, durably; a copy that an earlier try completed is kept."""
    for file in output.record.files:
        copy = source / file.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if copy.is_file() and describe_file(copy, file.name) == file:
            continue
        temporary = copy.with_name(f".{copy.name}.part")
        shutil.copyfile(output.path(file), temporary)
        shutil.copymode(output.path(file), temporary)
        sync_file(temporary)
        temporary.replace(copy)
