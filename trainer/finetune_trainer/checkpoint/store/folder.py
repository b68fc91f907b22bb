"""Checkpoints in a folder: of a local disk, or of one that all pods share (NFS, a shared volume).

Files are written into a folder aside and made durable; the manifest last. The rename of that folder makes it count.
Nothing depends on locks or on what another machine has cached: names are only ever made anew.
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
    COPY,
    CheckpointStore,
    StageHook,
    by_name,
    checkpoint_name,
    ordered_names,
    telling,
)
from finetune_trainer.checkpoint.store.fence import Fence
from finetune_trainer.checkpoint.store.retention import Retention
from finetune_trainer.checkpoint.store.stages import SaveStage, write_stage
from finetune_trainer.checkpoint.store.tensor_stream import write_stream
from finetune_trainer.files import sync_file, sync_folder, write_aside

_WRITING = ".writing-"
_DELETING = ".deleting-"
_PROBE = ".probe-"
NUM_STREAMS = 2
"""Files that are written, or read back, at a time: one core hashes slower than a good disk writes."""
_TAKEN = frozenset({errno.ENOTEMPTY, errno.EEXIST})


class FolderStore(CheckpointStore):
    """The checkpoints below a job's folder; see `CheckpointStore`.

    Args:
        job_dir: the job's folder on the storage.
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
        """Mark the attempt, and sweep."""
        with telling():
            self._folder.mkdir(parents=True, exist_ok=True)
            self._fence.mark()
            for entry in self._folder.iterdir():
                if entry.name.startswith((_WRITING, _DELETING)):
                    shutil.rmtree(entry, ignore_errors=True)
                elif entry.name.startswith(_PROBE):
                    entry.unlink(missing_ok=True)

    def put_probe(self) -> str:
        """Leave a file of a new name."""
        name = f"{_PROBE}{secrets.token_hex(8)}"
        with telling():
            (self._folder / name).touch()
            sync_folder(self._folder)
        return name

    def has_probe(self, name: str) -> bool:
        """Whether it is on this disk, too."""
        return (self._folder / name).exists()

    def remove_probe(self, name: str) -> None:
        """Take it away again."""
        with contextlib.suppress(OSError):
            (self._folder / name).unlink()

    def find(self, name: str) -> Committed:
        """It is on the same disk; the one who chose it has looked at every byte."""
        with telling():
            return Committed(self._folder / name, read_manifest(self._folder / name))

    def num_corrupt(self) -> int:
        """How many have the name of one that was set aside."""
        with contextlib.suppress(OSError):
            return sum(entry.name.startswith(paths.CORRUPT) for entry in self._folder.iterdir())
        return 0

    def claim(self, step: int) -> bool:
        """Make a folder: that is exclusive on NFS, too."""
        with telling():
            try:
                (self._folder / f"{_WRITING}claim-{checkpoint_name(step, self._attempt)}").mkdir()
            except FileExistsError:
                return False
        return True

    def discard(self, step: int, writer: str = "") -> None:
        """Remove the folder aside."""
        shutil.rmtree(self._aside(step, writer), ignore_errors=True)

    def _check_fence(self) -> None:
        self._fence.check()

    def _list(self) -> list[tuple[int, int]]:
        return ordered_names(folder.name for folder in self._folder.iterdir())

    def _verified(self, name: str) -> Committed:
        return Committed(self._folder / name, verify(self._folder / name, self._job_uid))

    def _set_aside(self, name: str, why: str) -> str:
        """Rename it, with the reason beside its files."""
        folder, number = self._folder / name, 1
        while (target := folder.with_name(f"{paths.CORRUPT}{name}-{number}")).exists():
            number += 1
        try:
            with contextlib.suppress(OSError):
                write_aside(folder / paths.CORRUPT_REASON, f"{why}\n".encode())
            folder.rename(target)
            sync_folder(self._folder)
        except OSError as error:
            return f"it cannot be set aside ({error.strerror}) and is skipped"
        return f"set aside as {target.name}"

    def _make_room(self, step: int, writer: str) -> None:
        shutil.rmtree(self._aside(step, writer), ignore_errors=True)

    def _write_part(self, snapshot: Snapshot, part: int, parts: int, writer: str) -> tuple[FileEntry, ...]:
        aside = self._aside(snapshot.step, writer)
        aside.mkdir(exist_ok=True)
        with ThreadPoolExecutor(NUM_STREAMS) as pool:
            streams = []
            for group, each in sorted(snapshot.tensors.items()):
                self.on_stage(write_stage(group))
                path = aside / file_name(group, part, parts)
                streams.append(pool.submit(write_stream, path, each, snapshot.offsets))
            files = tuple(stream.result() for stream in streams)
            self.on_stage(SaveStage.READ_BACK)
            list(pool.map(lambda entry: verify_file(aside, entry, from_disk=True), files))
        return files

    def _copy_in(self, committed: Committed) -> tuple[FileEntry, ...]:
        aside = self._aside(committed.manifest.step, COPY)
        for entry in committed.manifest.files:
            target = aside / entry.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(committed.folder / entry.name, target)
            sync_file(target)
            verify_file(aside, entry, from_disk=True)
        return committed.manifest.files

    def _write_state(self, step: int, writer: str, state: bytes, files: tuple[FileEntry, ...]) -> tuple[FileEntry, ...]:
        aside = self._aside(step, writer)
        (aside / STATE).write_bytes(state)
        sync_file(aside / STATE)
        entry = FileEntry(name=STATE, size_bytes=len(state), sha256=hashlib.sha256(state).hexdigest())
        verify_file(aside, entry, from_disk=True)
        for file in files:
            # Another rank's part was read back by that rank; here it must be seen, too.
            verify_size(aside, file)
        return by_name((*files, entry))

    def _publish(self, manifest: Manifest, writer: str) -> Committed:
        aside = self._aside(manifest.step, writer)
        self.on_stage(SaveStage.WRITE_MANIFEST)
        (aside / paths.MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
        sync_file(aside / paths.MANIFEST)
        sync_folder(aside)
        self.on_stage(SaveStage.CHECK_FENCE)
        self._fence.check()
        self.on_stage(SaveStage.RENAME)
        return Committed(self._rename(aside, checkpoint_name(manifest.step, manifest.attempt)), manifest)

    def _rename(self, aside: Path, name: str) -> Path:
        """Give a checkpoint the name by which it counts."""
        folder = self._folder / name
        try:
            aside.rename(folder)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
            self._replace(folder, aside)
        sync_folder(self._folder)
        return folder

    def _replace(self, folder: Path, aside: Path) -> None:
        """There is one of this name: a survivor of the same attempt wrote the same state, or it is damaged."""
        try:
            verify(folder, self._job_uid)
        except BadCheckpointError as error:
            self._set_aside(folder.name, str(error))
            aside.rename(folder)
        else:
            shutil.rmtree(aside, ignore_errors=True)

    def _remove(self, name: str) -> None:
        """Rename, then delete."""
        aside = self._folder / f"{_DELETING}{name}"
        shutil.rmtree(aside, ignore_errors=True)
        (self._folder / name).rename(aside)
        self.on_stage(SaveStage.DELETE)
        shutil.rmtree(aside, ignore_errors=True)

    def _aside(self, step: int, writer: str) -> Path:
        return self._folder / f"{_WRITING}{checkpoint_name(step, self._attempt)}{writer}"
