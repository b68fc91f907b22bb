"""Checkpoints in a folder, on a local disk or on shared storage (NFS, a shared volume).

Files are written durably to a temporary folder, the manifest last. The rename of that folder is the commit. Nothing
depends on locks or on another machine's cache, because every name is new.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import secrets
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from finetune_contract import paths
from finetune_contract.manifest import (
    BadCheckpointError,
    FileEntry,
    Manifest,
    read_manifest,
    verify,
    verify_file,
    verify_size,
)
from finetune_trainer.checkpoint.snapshot import STATE, Committed, Snapshot
from finetune_trainer.checkpoint.split import file_name
from finetune_trainer.checkpoint.store.base import (
    IMPORT_WRITER,
    CheckpointStore,
    StageHook,
    by_name,
    checkpoint_name,
    ordered_names,
    storage_errors,
)
from finetune_trainer.checkpoint.store.fence import Fence
from finetune_trainer.checkpoint.store.retention import Retention
from finetune_trainer.checkpoint.store.stages import SaveStage, write_stage
from finetune_trainer.checkpoint.store.tensor_stream import write_stream
from finetune_trainer.files import sync_file, sync_folder, write_atomically

_WRITING = ".writing-"
_DELETING = ".deleting-"
_PROBE = ".probe-"
NUM_STREAMS = 2
"""Number of files written, or read back, at a time: one core hashes more slowly than a fast disk writes."""
_TAKEN = frozenset({errno.ENOTEMPTY, errno.EEXIST})


class FolderStore(CheckpointStore):
    """The checkpoints in a job's folder; see `CheckpointStore`.

    Args:
        job_dir: the job's folder on the storage.
        job_uid: see `CheckpointStore`.
        attempt: see `CheckpointStore`.
        retention: see `CheckpointStore`.
        on_stage: see `CheckpointStore`.
    """

    def __init__(
        self,
        job_dir: Path,
        job_uid: str,
        attempt: int,
        retention: Retention,
        on_stage: StageHook = lambda _: None,
    ) -> None:
        super().__init__(job_uid, attempt, retention, on_stage)
        self._folder = paths.checkpoints(job_dir)
        self._fence = Fence(job_dir, attempt)

    def open(self) -> None:
        """Mark the attempt, and remove temporary folders and probes."""
        with storage_errors():
            self._folder.mkdir(parents=True, exist_ok=True)
            self._fence.mark()
            for entry in self._folder.iterdir():
                if entry.name.startswith((_WRITING, _DELETING)):
                    shutil.rmtree(entry, ignore_errors=True)
                elif entry.name.startswith(_PROBE):
                    entry.unlink(missing_ok=True)

    def put_probe(self) -> str:
        """Create a file with a new name."""
        name = f"{_PROBE}{secrets.token_hex(8)}"
        with storage_errors():
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / name).touch()
            sync_folder(self._folder)
        return name

    def has_probe(self, name: str) -> bool:
        """Return whether the file exists on this rank's disk, too."""
        return (self._folder / name).exists()

    def remove_probe(self, name: str) -> None:
        """Remove the file, if possible."""
        with contextlib.suppress(OSError):
            (self._folder / name).unlink()

    def find(self, name: str) -> Committed:
        """Read the manifest only: the rank that chose the checkpoint has verified every byte on the same disk."""
        with storage_errors():
            return Committed(self._folder / name, read_manifest(self._folder / name))

    def num_corrupt(self) -> int:
        """Return how many folders have the name of a quarantined checkpoint."""
        with contextlib.suppress(OSError):
            return sum(entry.name.startswith(paths.CORRUPT) for entry in self._folder.iterdir())
        return 0

    def claim(self, step: int) -> bool:
        """Create a folder, which is exclusive on NFS, too."""
        with storage_errors():
            try:
                (self._folder / f"{_WRITING}claim-{checkpoint_name(step, self._attempt)}").mkdir()
            except FileExistsError:
                return False
        return True

    def discard(self, step: int, writer: str = "") -> None:
        """Remove the temporary folder."""
        shutil.rmtree(self._temporary_folder(step, writer), ignore_errors=True)

    def _check_fence(self) -> None:
        self._fence.check()

    def _list(self) -> list[tuple[int, int]]:
        return ordered_names(folder.name for folder in self._folder.iterdir())

    def _verified(self, name: str) -> Committed:
        return Committed(self._folder / name, verify(self._folder / name, self._job_uid))

    def _quarantine(self, name: str, why: str) -> str:
        """Rename the checkpoint's folder, with the reason in a file."""
        folder, number = self._folder / name, 1
        while (target := folder.with_name(f"{paths.CORRUPT}{name}-{number}")).exists():
            number += 1
        try:
            with contextlib.suppress(OSError):
                write_atomically(folder / paths.CORRUPT_REASON, f"{why}\n".encode())
            folder.rename(target)
            sync_folder(self._folder)
        except OSError as error:
            return f"it cannot be renamed ({error.strerror}) and is skipped"
        return f"renamed to {target.name}"

    def _clear_leftovers(self, step: int, writer: str) -> None:
        shutil.rmtree(self._temporary_folder(step, writer), ignore_errors=True)

    def _write_part(self, snapshot: Snapshot, part: int, parts: int, writer: str) -> tuple[FileEntry, ...]:
        temporary = self._temporary_folder(snapshot.step, writer)
        temporary.mkdir(exist_ok=True)
        with ThreadPoolExecutor(NUM_STREAMS) as pool:
            streams = []
            for group, each in sorted(snapshot.tensors.items()):
                self.on_stage(write_stage(group))
                path = temporary / file_name(group, part, parts)
                streams.append(pool.submit(write_stream, path, each, snapshot.offsets))
            files = tuple(stream.result() for stream in streams)
            self.on_stage(SaveStage.READ_BACK)
            list(pool.map(lambda entry: verify_file(temporary, entry, from_disk=True), files))
        return files

    def _import_files(self, committed: Committed) -> tuple[FileEntry, ...]:
        temporary = self._temporary_folder(committed.manifest.step, IMPORT_WRITER)
        for entry in committed.manifest.files:
            target = temporary / entry.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(committed.folder / entry.name, target)
            sync_file(target)
            verify_file(temporary, entry, from_disk=True)
        return committed.manifest.files

    def _write_state(self, step: int, writer: str, state: bytes, files: tuple[FileEntry, ...]) -> tuple[FileEntry, ...]:
        temporary = self._temporary_folder(step, writer)
        (temporary / STATE).write_bytes(state)
        sync_file(temporary / STATE)
        entry = FileEntry(name=STATE, size_bytes=len(state), sha256=hashlib.sha256(state).hexdigest())
        verify_file(temporary, entry, from_disk=True)
        for file in files:
            # Another rank has read its part back; check that it is visible from here, too.
            verify_size(temporary, file)
        return by_name((*files, entry))

    def _publish(self, manifest: Manifest, writer: str) -> Committed:
        temporary = self._temporary_folder(manifest.step, writer)
        self.on_stage(SaveStage.WRITE_MANIFEST)
        (temporary / paths.MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
        sync_file(temporary / paths.MANIFEST)
        sync_folder(temporary)
        self.on_stage(SaveStage.CHECK_FENCE)
        self._fence.check()
        self.on_stage(SaveStage.RENAME)
        return Committed(self._rename(temporary, checkpoint_name(manifest.step, manifest.attempt)), manifest)

    def _rename(self, temporary: Path, name: str) -> Path:
        """Give a checkpoint its final name, which commits it."""
        folder = self._folder / name
        try:
            temporary.rename(folder)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
            self._replace(folder, temporary)
        sync_folder(self._folder)
        return folder

    def _replace(self, folder: Path, temporary: Path) -> None:
        """Keep a valid checkpoint that has this name, or replace a damaged one.

        A valid one holds the same state: a survivor of the same attempt wrote it.
        """
        try:
            verify(folder, self._job_uid)
        except BadCheckpointError as error:
            self._quarantine(folder.name, str(error))
            temporary.rename(folder)
        else:
            shutil.rmtree(temporary, ignore_errors=True)

    def _remove(self, name: str) -> None:
        """Rename the folder, then delete it."""
        temporary = self._folder / f"{_DELETING}{name}"
        shutil.rmtree(temporary, ignore_errors=True)
        (self._folder / name).rename(temporary)
        self.on_stage(SaveStage.DELETE)
        shutil.rmtree(temporary, ignore_errors=True)

    def _temporary_folder(self, step: int, writer: str) -> Path:
        return self._folder / f"{_WRITING}{checkpoint_name(step, self._attempt)}{writer}"
