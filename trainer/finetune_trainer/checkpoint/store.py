"""The checkpoints of one job on its storage. Only rank 0 has one.

A save is written into a folder aside, each file made durable, the manifest last; then the folder is renamed, its parent
made durable, and everything is read back. Only then do older checkpoints go. A kill at any moment leaves whole
checkpoints and, at most, a folder whose name says that it does not count; the next attempt sweeps those away.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune_contract import paths
from finetune_trainer.checkpoint.fence import Fence
from finetune_trainer.checkpoint.manifest import BadCheckpointError, FileEntry, Manifest, describe_files, verify
from finetune_trainer.errors import StorageError
from finetune_trainer.files import sync_file, sync_folder

_LOG = logging.getLogger(__name__)

STATE = "state.json"
_TENSORS = ".safetensors"
_NAME = re.compile(r"step-(\d{8,})-a(\d+)")
_WRITING = ".writing-"
_DELETING = ".deleting-"


@dataclass(frozen=True)
class Snapshot:
    """The state of a run after a step.

    Attributes:
        step: finished optimizer steps.
        tensors: groups of named tensors, e.g. "model" and "optimizer"; each becomes one file.
        values: everything else, as JSON.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
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
    """Saves, chooses and prunes.

    Args:
        job_dir: the job's folder on the storage.
        job_uid: whose checkpoints count.
        attempt: which attempt this is.
        keep: how many checkpoints stay.
        on_stage: called between any two stages of a save, with the name of the one to come; tests kill the process
            there.
    """

    def __init__(
        self,
        job_dir: Path,
        job_uid: str,
        attempt: int,
        keep: int,
        on_stage: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._folder = paths.checkpoints(job_dir)
        self._fence = Fence(job_dir, attempt)
        self._job_uid = job_uid
        self._attempt = attempt
        self._keep = keep
        self._on_stage = on_stage

    def open(self) -> None:
        """Mark the attempt, and sweep away what killed saves have left.

        Raises:
            SupersededError: a newer attempt has begun.
            StorageError: the storage cannot be written.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._fence.mark()
            for entry in self._folder.iterdir():
                if entry.name.startswith((_WRITING, _DELETING)):
                    shutil.rmtree(entry, ignore_errors=True)
        except OSError as error:
            raise _storage_error(error) from error

    def choose(self, warn: Callable[[str], None]) -> Committed | None:
        """The newest checkpoint that verifies; each that does not is told to `warn` and left alone.

        Raises:
            StorageError: the storage cannot be read.
        """
        try:
            candidates = sorted(self._list(), reverse=True)
        except OSError as error:
            raise _storage_error(error) from error
        for _, _, folder in candidates:
            try:
                return Committed(folder, verify(folder, self._job_uid))
            except BadCheckpointError as error:
                warn(f"checkpoint {folder.name} is skipped: {error}")
        return None

    def save(self, snapshot: Snapshot, time: float) -> Committed:
        """Write a checkpoint, verify it, and only then let older ones go.

        Args:
            snapshot: what to save.
            time: now, seconds since the epoch, for the manifest.

        Raises:
            SupersededError: a newer attempt has begun; nothing was committed.
            StorageError: it could not be written or does not read back.
        """
        name = f"step-{snapshot.step:08d}-a{self._attempt}"
        try:
            aside = self._write(snapshot, name, time)
            self._on_stage("check the fence")
            self._fence.check()
            self._on_stage("rename")
            folder = self._rename(aside, name)
            self._on_stage("read back")
            committed = Committed(folder, verify(folder, self._job_uid))
            self._on_stage("prune")
            self._prune(committed)
        except (OSError, SafetensorError) as error:
            # A newer attempt sweeps away what an older one still writes: then that is the cause.
            self._fence.check()
            raise _storage_error(error) from error
        except BadCheckpointError as error:
            raise StorageError(f"checkpoint {name} does not read back as written: {error}") from error
        self._on_stage("done")
        return committed

    def load(self, committed: Committed) -> Snapshot:
        """Read a verified checkpoint.

        Raises:
            StorageError: it can no longer be read.
        """
        names = [entry.name for entry in committed.manifest.files]
        try:
            values = json.loads((committed.folder / STATE).read_text(encoding="utf-8"))
            tensors = {
                name.removesuffix(_TENSORS): load_file(committed.folder / name)
                for name in names
                if name.endswith(_TENSORS)
            }
        except (OSError, ValueError, SafetensorError) as error:
            raise StorageError(f"checkpoint {committed.folder.name} cannot be read: {error}") from error
        return Snapshot(committed.manifest.step, tensors, values)

    def _write(self, snapshot: Snapshot, name: str, time: float) -> Path:
        """Write all files of a checkpoint aside, the manifest last; all of it durable."""
        aside = self._folder / f"{_WRITING}{name}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        for group, tensors in sorted(snapshot.tensors.items()):
            self._on_stage(f"write {group}")
            save_file(
                {key: value.detach().contiguous().cpu() for key, value in tensors.items()}, aside / f"{group}{_TENSORS}"
            )
        self._on_stage("write state")
        (aside / STATE).write_text(json.dumps(snapshot.values, indent=1, sort_keys=True), encoding="utf-8")
        files: tuple[FileEntry, ...] = describe_files(aside, [entry.name for entry in aside.iterdir()])
        for entry in files:
            sync_file(aside / entry.name)
        self._on_stage("write manifest")
        manifest = Manifest(job_uid=self._job_uid, attempt=self._attempt, step=snapshot.step, time=time, files=files)
        (aside / paths.MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
        sync_file(aside / paths.MANIFEST)
        sync_folder(aside)
        return aside

    def _rename(self, aside: Path, name: str) -> Path:
        folder = self._folder / name
        if folder.exists():
            # Only a damaged one can be here: a whole one would have been resumed from.
            self._remove(folder)
        aside.rename(folder)
        sync_folder(self._folder)
        return folder

    def _prune(self, newest: Committed) -> None:
        """Remove what is older than a verified checkpoint and beyond `keep`.

        Newer ones were found damaged when this attempt chose, or are of a superseded attempt: they do not count.
        """
        rank = (newest.manifest.step, newest.manifest.attempt)
        older = sorted((entry for entry in self._list() if entry[:2] < rank), reverse=True)
        for _, _, folder in older[self._keep - 1 :]:
            self._fence.check()
            self._on_stage(f"remove {folder.name}")
            self._remove(folder)

    def _remove(self, folder: Path) -> None:
        """Take a checkpoint out of the list in one rename, then delete it: a kill leaves no half that looks whole."""
        aside = folder.with_name(f"{_DELETING}{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        self._on_stage("delete")
        shutil.rmtree(aside, ignore_errors=True)

    def _list(self) -> list[tuple[int, int, Path]]:
        """Step, attempt and folder of everything with the name of a checkpoint."""
        found = []
        for folder in self._folder.iterdir():
            match = _NAME.fullmatch(folder.name)
            if match:
                found.append((int(match[1]), int(match[2]), folder))
        return found


def _storage_error(error: Exception) -> StorageError:
    where = getattr(error, "filename", None)
    what = getattr(error, "strerror", None) or str(error)
    return StorageError(f"checkpoint storage: {what}" + (f" ({where})" if where else ""))
