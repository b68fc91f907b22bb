"""The checkpoints of one job on one storage, as one rank sees them: the part that all kinds of storage share.

One or several ranks write a checkpoint, each its own files. Every file is flushed to durable storage, then read back.
One rank commits: it writes the manifest last, and only a checkpoint with a manifest counts. The attempt fence is
checked before and after the commit. Only then are older checkpoints removed. A kill at any moment leaves complete
checkpoints and, at most, files that no manifest names; the next attempt removes those.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from finetune_contract.manifest import BadCheckpointError, FileEntry, ForeignCheckpointError, Manifest
from finetune_trainer.checkpoint.snapshot import BEST, STATE, Committed, Snapshot
from finetune_trainer.checkpoint.split import group_of
from finetune_trainer.checkpoint.store.retention import Retention, removable
from finetune_trainer.checkpoint.store.stages import SaveStage
from finetune_trainer.errors import StorageError

_LOG = logging.getLogger(__name__)

NAME = re.compile(r"step-(\d{8,})-a(\d+)")
"""Name of a checkpoint that counts: its step and the attempt that wrote it."""
IMPORT_WRITER = "-copy"
"""Writer suffix of checkpoints that are copied from another storage."""
StageHook = Callable[[str], None]


def checkpoint_name(step: int, attempt: int) -> str:
    """Return the name of a checkpoint."""
    return f"step-{step:08d}-a{attempt}"


class CheckpointStore(ABC):
    """Writes, commits, chooses and prunes checkpoints.

    Args:
        job_uid: UID of the job; only its checkpoints count.
        attempt: number of this attempt.
        retention: which checkpoints to keep.
        on_stage: called before each stage of a save with its name; tests kill the process there.
    """

    def __init__(self, job_uid: str, attempt: int, retention: Retention, on_stage: StageHook = lambda _: None) -> None:
        self._job_uid = job_uid
        self._attempt = attempt
        self._retention = retention
        self.on_stage = on_stage

    @abstractmethod
    def open(self) -> None:
        """Mark the attempt, and remove the leftovers of killed saves.

        Raises:
            SupersededError: a newer attempt has begun.
            StorageError: the storage cannot be written.
        """

    @abstractmethod
    def put_probe(self) -> str:
        """Create a probe with a new random name, and return the name.

        The name is new, so no file system can have cached that it does not exist.

        Raises:
            StorageError: the storage cannot be written.
        """

    @abstractmethod
    def has_probe(self, name: str) -> bool:
        """Return whether another rank's probe is visible here, so that both ranks share this storage."""

    @abstractmethod
    def remove_probe(self, name: str) -> None:
        """Remove a probe, if possible."""

    @abstractmethod
    def find(self, name: str) -> Committed:
        """Return a checkpoint that another rank has chosen, so that this rank can read it.

        Raises:
            StorageError: the checkpoint is missing.
        """

    @abstractmethod
    def num_corrupt(self) -> int:
        """Return how many damaged checkpoints have been quarantined since the job started."""

    @abstractmethod
    def claim(self, step: int) -> bool:
        """Claim the writing of a step for this process; return False if another process of this attempt has claimed it.

        Raises:
            StorageError: the storage cannot be written.
        """

    @abstractmethod
    def discard(self, step: int, writer: str = "") -> None:
        """Remove the files of a failed save, as far as possible."""

    def choose(self, warn: Callable[[str], None]) -> Committed | None:
        """Return the newest valid checkpoint; None if there is none.

        Each newer checkpoint is reported to `warn`; damaged ones are quarantined.

        Raises:
            StorageError: the storage cannot be read.
        """
        with storage_errors():
            candidates = sorted(self._list(), reverse=True)
        for step, attempt in candidates:
            name = checkpoint_name(step, attempt)
            try:
                return self._verified(name)
            except ForeignCheckpointError as error:
                warn(f"checkpoint {name} is skipped: {error}")
            except BadCheckpointError as error:
                warn(f"checkpoint {name} is damaged: {error}; {self._quarantine(name, str(error))}")
        return None

    def holds(self, step: int) -> bool:
        """Return whether this attempt, or an older one, has committed this step or a later one."""
        with storage_errors():
            return any(entry >= step and attempt <= self._attempt for entry, attempt in self._list())

    def save(self, snapshot: Snapshot, time: float, writer: str = "") -> Committed:
        """Write a complete checkpoint, verify it, and then remove older ones.

        Args:
            snapshot: the state to save.
            time: current time in seconds since the epoch, for the manifest.
            writer: suffix that separates processes that may write the same step at the same time.

        Raises:
            SupersededError: a newer attempt has begun; nothing was committed.
            StorageError: the checkpoint cannot be written, or reads back differently.
        """
        with self._reporting_superseded():
            self._clear_leftovers(snapshot.step, writer)
        files = self.write_part(snapshot, 0, 1, writer)
        return self.commit(snapshot, files, time, writer)

    def write_part(self, snapshot: Snapshot, part: int, parts: int, writer: str = "") -> tuple[FileEntry, ...]:
        """Write one part of a checkpoint durably, and read it back.

        Args:
            snapshot: the state; its tensors are those of this part.
            part: index of the part, from 0.
            parts: number of parts.
            writer: see `save`.

        Returns:
            The files of this part.

        Raises:
            SupersededError: a newer attempt has begun.
            StorageError: the part cannot be written, or reads back differently.
        """
        with self._reporting_superseded():
            return self._write_part(snapshot, part, parts, writer)

    def commit(self, snapshot: Snapshot, files: Iterable[FileEntry], time: float, writer: str = "") -> Committed:
        """Commit the written files as a checkpoint, and then remove older ones.

        Args:
            snapshot: the state; its step and values are written here, its tensors are in the files.
            files: the files of all parts.
            time: see `save`.
            writer: see `save`.

        Raises:
            SupersededError: a newer attempt has begun; the checkpoint does not count.
            StorageError: the manifest cannot be written, or a part is missing.
        """
        with self._reporting_superseded():
            self.on_stage(SaveStage.WRITE_STATE)
            state = json.dumps(snapshot.values, indent=1, sort_keys=True).encode()
            ordered = self._write_state(snapshot.step, writer, state, tuple(files))
            plain = Manifest(job_uid=self._job_uid, attempt=self._attempt, step=snapshot.step, time=time, files=ordered)
            committed = self._publish(plain.sealed(), writer)
            self.on_stage(SaveStage.CHECK_FENCE_AGAIN)
            self._check_fence()
            self.on_stage(SaveStage.PRUNE)
            self._prune(committed, snapshot.values.get(BEST))
        self.on_stage(SaveStage.DONE)
        return committed

    def import_checkpoint(self, committed: Committed) -> Committed:
        """Copy a checkpoint from another storage of the same job, verify the copy, and remove older ones.

        Raises:
            SupersededError: a newer attempt has begun; the copy does not count.
            StorageError: the checkpoint cannot be copied.
        """
        manifest = committed.manifest
        with self._reporting_superseded():
            if self.holds(manifest.step):
                return committed
            best = self.load_values(committed).get(BEST)
            self._clear_leftovers(manifest.step, IMPORT_WRITER)
            files = self._import_files(committed)
            plain = manifest.model_copy(update={"files": by_name(files), "attempt": self._attempt})
            copy = self._publish(plain.sealed(), IMPORT_WRITER)
            self._check_fence()
            self._prune(copy, best)
        return copy

    def newest(self) -> tuple[int, int]:
        """Return step and attempt of the newest checkpoint by name, unverified; (-1, 0) if there is none.

        Raises:
            StorageError: the storage cannot be read.
        """
        with storage_errors():
            return max(self._list(), default=(-1, 0))

    def kept(self) -> list[tuple[int, int]]:
        """Return step and attempt of each checkpoint by name, unverified.

        Raises:
            StorageError: the storage cannot be read.
        """
        with storage_errors():
            return list(self._list())

    @property
    def durable(self) -> CheckpointStore:
        """Return the storage that survives the loss of this machine. Defaults to self."""
        return self

    def load(self, committed: Committed) -> Snapshot:
        """Read a chosen checkpoint.

        Raises:
            StorageError: the checkpoint can no longer be read.
        """
        tensors: dict[str, dict[str, Tensor]] = {}
        try:
            for entry in committed.manifest.files:
                path = committed.folder / entry.name
                if group := group_of(path.name):
                    tensors.setdefault(group, {}).update(load_file(path))
        except (OSError, SafetensorError) as error:
            raise StorageError(f"checkpoint {committed.folder.name} cannot be read: {error}") from error
        return Snapshot(committed.manifest.step, tensors, self.load_values(committed))

    def load_values(self, committed: Committed) -> dict[str, Any]:
        """Read the values of a checkpoint that are not tensors.

        Raises:
            StorageError: the checkpoint can no longer be read.
        """
        files = [committed.folder / entry.name for entry in committed.manifest.files]
        try:
            (state,) = (path for path in files if path.name == STATE)
            return dict(json.loads(state.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise StorageError(f"checkpoint {committed.folder.name} cannot be read: {error}") from error

    @abstractmethod
    def _check_fence(self) -> None:
        """Raise SupersededError if a newer attempt has begun."""

    @abstractmethod
    def _list(self) -> list[tuple[int, int]]:
        """Return step and attempt of everything with the name of a checkpoint."""

    @abstractmethod
    def _verified(self, name: str) -> Committed:
        """Return a checkpoint after every byte was verified.

        Raises:
            BadCheckpointError: see `manifest.verify`.
        """

    @abstractmethod
    def _quarantine(self, name: str, why: str) -> str:
        """Keep a damaged checkpoint, with the reason, where it no longer counts; return what was done, as text."""

    @abstractmethod
    def _clear_leftovers(self, step: int, writer: str) -> None:
        """Remove the leftovers of an earlier try of the same writer."""

    @abstractmethod
    def _write_part(self, snapshot: Snapshot, part: int, parts: int, writer: str) -> tuple[FileEntry, ...]:
        """See `write_part`."""

    @abstractmethod
    def _import_files(self, committed: Committed) -> tuple[FileEntry, ...]:
        """Copy the files of another storage's checkpoint durably, and read them back."""

    @abstractmethod
    def _write_state(self, step: int, writer: str, state: bytes, files: tuple[FileEntry, ...]) -> tuple[FileEntry, ...]:
        """Write state.json, check that all parts exist, and return all files in the order of their names."""

    @abstractmethod
    def _publish(self, manifest: Manifest, writer: str) -> Committed:
        """Write the manifest, check the fence, and commit the checkpoint."""

    @abstractmethod
    def _remove(self, name: str) -> None:
        """Remove a checkpoint from the list first, then delete it, so that a kill leaves no incomplete checkpoint."""

    def _prune(self, newest: Committed, best: Mapping[str, Any] | None) -> None:
        """Remove the checkpoints that the retention does not keep."""
        entry = (newest.manifest.step, newest.manifest.attempt)
        try:
            best_step = None if best is None else int(best["step"])
            for step, attempt in removable(self._list(), entry, self._retention, best_step):
                name = checkpoint_name(step, attempt)
                self._check_fence()
                self.on_stage(f"{SaveStage.REMOVE} {name}")
                self._remove(name)
        except OSError as error:
            # The newer checkpoint is committed; the next save retries the removal.
            _LOG.warning("checkpoint storage: an old checkpoint cannot be removed: %s", error)

    @contextlib.contextmanager
    def _reporting_superseded(self) -> Iterator[None]:
        """Raise SupersededError instead of StorageError if a newer attempt has begun.

        A newer attempt removes the files that an older one still writes, so it is the cause of the failure.
        """
        try:
            with storage_errors():
                yield
        except StorageError:
            with contextlib.suppress(OSError):
                self._check_fence()
            raise


def ordered_names(found: Iterable[str]) -> list[tuple[int, int]]:
    """Return step and attempt of the names that are names of checkpoints."""
    matches = (NAME.fullmatch(name) for name in found)
    return [(int(match[1]), int(match[2])) for match in matches if match]


def by_name(files: Iterable[FileEntry]) -> tuple[FileEntry, ...]:
    """Return files in the order of a manifest."""
    return tuple(sorted(files, key=lambda file: file.name))


@contextlib.contextmanager
def storage_errors() -> Iterator[None]:
    """Convert errors of the storage to StorageError with a one-line message."""
    try:
        yield
    except OSError as error:
        where = error.filename
        what = error.strerror or str(error)
        raise StorageError(f"checkpoint storage: {what}" + (f" ({where})" if where else "")) from error
    except BadCheckpointError as error:
        raise StorageError(f"checkpoint storage: written data reads back differently: {error}") from error
