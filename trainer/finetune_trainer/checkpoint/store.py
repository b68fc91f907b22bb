"""The checkpoints of one job on one storage, as one rank sees them.

A save is written into a folder aside by one rank or by several, each its own files; every file is made durable, then
read back from the disk. One rank commits: the manifest is written last, the folder renamed, its parent made durable,
the attempt fence looked at. Only then do older checkpoints go. A kill at any moment leaves whole checkpoints and, at
most, folders whose names say that they do not count; the next attempt sweeps those away.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from finetune_contract import paths
from finetune_contract.manifest import (
    BadCheckpointError,
    FileEntry,
    ForeignCheckpointError,
    Manifest,
    verify,
    verify_file,
    verify_size,
)
from finetune_trainer.checkpoint.fence import Fence
from finetune_trainer.checkpoint.retention import Retention, removable
from finetune_trainer.checkpoint.split import Groups, file_name, group_of
from finetune_trainer.checkpoint.stages import SaveStage, write_stage
from finetune_trainer.checkpoint.tensor_stream import write_stream
from finetune_trainer.errors import StorageError
from finetune_trainer.files import sync_file, sync_folder, write_aside

_LOG = logging.getLogger(__name__)

STATE = "state.json"
BEST = "best_validation"
"""Key of a snapshot's values: {"step", "loss"} of the best validation so far; its checkpoint may stay for that."""
_NAME = re.compile(r"step-(\d{8,})-a(\d+)")
_WRITING = ".writing-"
_DELETING = ".deleting-"
_PROBE = ".probe-"
_TAKEN = frozenset({errno.ENOTEMPTY, errno.EEXIST})
StageHook = Callable[[str], None]


@dataclass(frozen=True)
class Snapshot:
    """The state of a run after a step.

    Attributes:
        step: finished optimizer steps.
        tensors: groups of named tensors, e.g. "model" and "optimizer".
        values: everything else, as JSON.
    """

    step: int
    tensors: Groups
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Committed:
    """A checkpoint that was verified."""

    folder: Path
    manifest: Manifest

    @property
    def size_bytes(self) -> int:
        """Size of its files."""
        return sum(entry.size_bytes for entry in self.manifest.files)


class CheckpointStore:
    """Writes, commits, chooses and prunes.

    Args:
        job_dir: the job's folder on the storage.
        job_uid: whose checkpoints count.
        attempt: which attempt this is.
        retention: what stays.
        on_stage: called between any two stages of a save, with the name of the one to come; tests kill the process
            there.
    """

    def __init__(
        self,
        job_dir: Path,
        job_uid: str,
        attempt: int,
        retention: Retention,
        on_stage: StageHook = lambda _: None,
    ) -> None:
        self._folder = paths.checkpoints(job_dir)
        self._fence = Fence(job_dir, attempt)
        self._job_uid = job_uid
        self._attempt = attempt
        self._retention = retention
        self.on_stage = on_stage

    def open(self) -> None:
        """Mark the attempt, and sweep away what killed saves have left.

        Raises:
            SupersededError: a newer attempt has begun.
            StorageError: the storage cannot be written.
        """
        with _telling():
            self._folder.mkdir(parents=True, exist_ok=True)
            self._fence.mark()
            for entry in self._folder.iterdir():
                if entry.name.startswith((_WRITING, _DELETING)):
                    shutil.rmtree(entry, ignore_errors=True)
                elif entry.name.startswith(_PROBE):
                    entry.unlink(missing_ok=True)

    def put_probe(self) -> str:
        """Leave a file of a name that nobody can have looked for yet, and return the name.

        Raises:
            StorageError: the storage cannot be written.
        """
        name = f"{_PROBE}{secrets.token_hex(8)}"
        with _telling():
            (self._folder / name).touch()
            sync_folder(self._folder)
        return name

    def has_probe(self, name: str) -> bool:
        """Whether another rank's probe is here: then the storage is the same one."""
        return (self._folder / name).exists()

    def remove_probe(self, name: str) -> None:
        """Take it away again."""
        with contextlib.suppress(OSError):
            (self._folder / name).unlink()

    def choose(self, warn: Callable[[str], None]) -> Committed | None:
        """The newest checkpoint that verifies.

        Each newer one is told to `warn`; those that are damaged are set aside under a name that says so.

        Raises:
            StorageError: the storage cannot be read.
        """
        with _telling():
            candidates = sorted(self._list(), reverse=True)
        for step, attempt in candidates:
            folder = self._path(step, attempt)
            try:
                return Committed(folder, verify(folder, self._job_uid))
            except ForeignCheckpointError as error:
                warn(f"checkpoint {folder.name} is skipped: {error}")
            except BadCheckpointError as error:
                warn(f"checkpoint {folder.name} is damaged: {error}; {self._set_aside(folder, str(error))}")
        return None

    def num_corrupt(self) -> int:
        """How many damaged checkpoints have been set aside in the life of the job."""
        with contextlib.suppress(OSError):
            return sum(entry.name.startswith(paths.CORRUPT) for entry in self._folder.iterdir())
        return 0

    def holds(self, step: int) -> bool:
        """Whether this attempt, or an older one, has committed this step or a later one."""
        with _telling():
            return any(entry >= step and attempt <= self._attempt for entry, attempt in self._list())

    def claim(self, step: int) -> bool:
        """Claim the writing of a step for this process; False where another one of this attempt has.

        Making a folder is exclusive on NFS, too.

        Raises:
            StorageError: the storage cannot be written.
        """
        with _telling():
            try:
                (self._folder / f"{_WRITING}claim-{self._name(step)}").mkdir()
            except FileExistsError:
                return False
        return True

    def save(self, snapshot: Snapshot, time: float, writer: str = "") -> Committed:
        """Write a checkpoint alone, verify it, and only then let older ones go.

        Args:
            snapshot: what to save.
            time: now, seconds since the epoch, for the manifest.
            writer: tells apart the processes that may write the same step at the same time.

        Raises:
            SupersededError: a newer attempt has begun; nothing was committed.
            StorageError: it could not be written or does not read back.
        """
        with self._guarded():
            shutil.rmtree(self._aside(snapshot.step, writer), ignore_errors=True)
        files = self.write_part(snapshot.step, snapshot.tensors, 0, 1, writer)
        return self.commit(snapshot, files, time, writer)

    def write_part(self, step: int, tensors: Groups, part: int, parts: int, writer: str = "") -> tuple[FileEntry, ...]:
        """Write one part of a checkpoint aside: durable, and read back.

        Args:
            step: finished optimizer steps.
            tensors: the tensors of this part.
            part: its number, from 0.
            parts: number of parts.
            writer: see `save`.

        Raises:
            SupersededError: a newer attempt has begun.
            StorageError: it could not be written or does not read back.
        """
        aside = self._aside(step, writer)
        files = []
        with self._guarded():
            aside.mkdir(exist_ok=True)
            for group, each in sorted(tensors.items()):
                self.on_stage(write_stage(group))
                files.append(write_stream(aside / file_name(group, part, parts), each))
            self.on_stage(SaveStage.READ_BACK)
            for entry in files:
                verify_file(aside, entry, from_disk=True)
        return tuple(files)

    def commit(self, snapshot: Snapshot, files: Iterable[FileEntry], time: float, writer: str = "") -> Committed:
        """Make what was written aside count, and only then let older checkpoints go.

        Args:
            snapshot: its step and values are written; its tensors are in the files.
            files: the files of all parts.
            time: see `save`.
            writer: see `save`.

        Raises:
            SupersededError: a newer attempt has begun; the checkpoint does not count.
            StorageError: it could not be written, or a part is missing.
        """
        aside = self._aside(snapshot.step, writer)
        with self._guarded():
            manifest = self._write_manifest(aside, snapshot, files, time)
            self.on_stage(SaveStage.CHECK_FENCE)
            self._fence.check()
            self.on_stage(SaveStage.RENAME)
            folder = self._rename(aside, snapshot.step)
            self.on_stage(SaveStage.CHECK_FENCE_AGAIN)
            self._fence.check()
            committed = Committed(folder, manifest)
            self.on_stage(SaveStage.PRUNE)
            self._prune(committed, snapshot.values.get(BEST))
        self.on_stage(SaveStage.DONE)
        return committed

    def discard(self, step: int, writer: str = "") -> None:
        """Remove what a failed save has written aside, as far as that is possible."""
        shutil.rmtree(self._aside(step, writer), ignore_errors=True)

    def load(self, committed: Committed) -> Snapshot:
        """Read a verified checkpoint.

        Raises:
            StorageError: it can no longer be read.
        """
        try:
            values = json.loads((committed.folder / STATE).read_text(encoding="utf-8"))
            tensors: dict[str, dict[str, Tensor]] = {}
            for entry in committed.manifest.files:
                if group := group_of(entry.name):
                    tensors.setdefault(group, {}).update(load_file(committed.folder / entry.name))
        except (OSError, ValueError, SafetensorError) as error:
            raise StorageError(f"checkpoint {committed.folder.name} cannot be read: {error}") from error
        return Snapshot(committed.manifest.step, tensors, values)

    def _write_manifest(self, aside: Path, snapshot: Snapshot, files: Iterable[FileEntry], time: float) -> Manifest:
        self.on_stage(SaveStage.WRITE_STATE)
        state = json.dumps(snapshot.values, indent=1, sort_keys=True).encode()
        (aside / STATE).write_bytes(state)
        sync_file(aside / STATE)
        entry = FileEntry(name=STATE, size_bytes=len(state), sha256=hashlib.sha256(state).hexdigest())
        verify_file(aside, entry, from_disk=True)
        ordered = tuple(sorted((*files, entry), key=lambda file: file.name))
        for file in ordered:
            # Another rank's part was read back by that rank; here it must be seen, too.
            verify_size(aside, file)
        self.on_stage(SaveStage.WRITE_MANIFEST)
        plain = Manifest(job_uid=self._job_uid, attempt=self._attempt, step=snapshot.step, time=time, files=ordered)
        manifest = plain.sealed()
        (aside / paths.MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
        sync_file(aside / paths.MANIFEST)
        sync_folder(aside)
        return manifest

    def _rename(self, aside: Path, step: int) -> Path:
        """Give a checkpoint the name by which it counts."""
        folder = self._path(step, self._attempt)
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
            self._set_aside(folder, str(error))
            aside.rename(folder)
        else:
            shutil.rmtree(aside, ignore_errors=True)

    def _set_aside(self, folder: Path, why: str) -> str:
        """Rename a damaged checkpoint, with the reason beside its files; say in words what became of it."""
        number = 1
        while (target := folder.with_name(f"{paths.CORRUPT}{folder.name}-{number}")).exists():
            number += 1
        try:
            with contextlib.suppress(OSError):
                write_aside(folder / paths.CORRUPT_REASON, f"{why}\n".encode())
            folder.rename(target)
            sync_folder(self._folder)
        except OSError as error:
            return f"it cannot be set aside ({error.strerror}) and is skipped"
        return f"set aside as {target.name}"

    def _prune(self, newest: Committed, best: Mapping[str, Any] | None) -> None:
        """Remove what the retention lets go of."""
        entry = (newest.manifest.step, newest.manifest.attempt)
        try:
            best_step = None if best is None else int(best["step"])
            for step, attempt in removable(self._list(), entry, self._retention, best_step):
                folder = self._path(step, attempt)
                self._fence.check()
                self.on_stage(f"{SaveStage.REMOVE} {folder.name}")
                self._remove(folder)
        except OSError as error:
            # The newer one is committed; the next save tries again.
            _LOG.warning("checkpoint storage: an old checkpoint cannot be removed: %s", error)

    def _remove(self, folder: Path) -> None:
        """Take a checkpoint out of the list in one rename, then delete it: a kill leaves no half that looks whole."""
        aside = folder.with_name(f"{_DELETING}{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        self.on_stage(SaveStage.DELETE)
        shutil.rmtree(aside, ignore_errors=True)

    def _list(self) -> list[tuple[int, int]]:
        """Step and attempt of everything with the name of a checkpoint."""
        matches = (_NAME.fullmatch(folder.name) for folder in self._folder.iterdir())
        return [(int(match[1]), int(match[2])) for match in matches if match]

    def _name(self, step: int) -> str:
        return f"step-{step:08d}-a{self._attempt}"

    def _path(self, step: int, attempt: int) -> Path:
        return self._folder / f"step-{step:08d}-a{attempt}"

    def _aside(self, step: int, writer: str) -> Path:
        return self._folder / f"{_WRITING}{self._name(step)}{writer}"

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """A newer attempt sweeps away what an older one still writes: then that is the cause of what fails."""
        try:
            with _telling():
                yield
        except StorageError:
            with contextlib.suppress(OSError):
                self._fence.check()
            raise


@contextlib.contextmanager
def _telling() -> Iterator[None]:
    """Say what is wrong with the storage in one sentence."""
    try:
        yield
    except OSError as error:
        where = error.filename
        what = error.strerror or str(error)
        raise StorageError(f"checkpoint storage: {what}" + (f" ({where})" if where else "")) from error
    except BadCheckpointError as error:
        raise StorageError(f"checkpoint storage: what was written does not read back: {error}") from error
