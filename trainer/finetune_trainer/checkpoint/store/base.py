"""The checkpoints of one job on one storage, as one rank sees them: what is common to every kind of storage.

A save is written by one rank or by several, each its own files; every file is made durable, then read back. One rank
commits: the manifest is written last, and that alone makes a checkpoint count; the attempt fence is looked at before
and behind it. Only then do older checkpoints go. A kill at any moment leaves whole checkpoints and, at most, files that
no manifest names; the next attempt sweeps those away.
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
COPY = "-copy"
"""Tells what is copied from another storage apart from what is written here."""
StageHook = Callable[[str], None]


def checkpoint_name(step: int, attempt: int) -> str:
    """Name of a checkpoint."""
    return f"step-{step:08d}-a{attempt}"


class CheckpointStore(ABC):
    """Writes, commits, chooses and prunes.

    Args:
        job_uid: whose checkpoints count.
        attempt: which attempt this is.
        retention: what stays.
        on_stage: called between any two stages of a save, with the name of the one to come; tests kill the process
            there.
    """

    def __init__(self, job_uid: str, attempt: int, retention: Retention, on_stage: StageHook = lambda _: None) -> None:
        self._job_uid = job_uid
        self._attempt = attempt
        self._retention = retention
        self.on_stage = on_stage

    @abstractmethod
    def open(self) -> None:
        """Mark the attempt, and sweep away what killed saves have left.

        Raises:
            SupersededError: a newer attempt has begun.
            StorageError: the storage cannot be written.
        """

    @abstractmethod
    def put_probe(self) -> str:
        """Leave something of a name that nobody can have looked for yet, and return the name.

        Raises:
            StorageError: the storage cannot be written.
        """

    @abstractmethod
    def has_probe(self, name: str) -> bool:
        """Whether another rank's probe is here: then the storage is the same one."""

    @abstractmethod
    def remove_probe(self, name: str) -> None:
        """Take it away again."""

    @abstractmethod
    def find(self, name: str) -> Committed:
        """A checkpoint that another rank has chosen, to be read by this one, too.

        Raises:
            StorageError: it is not here.
        """

    @abstractmethod
    def num_corrupt(self) -> int:
        """How many damaged checkpoints have been set aside in the life of the job."""

    @abstractmethod
    def claim(self, step: int) -> bool:
        """Claim the writing of a step for this process; False where another one of this attempt has.

        Raises:
            StorageError: the storage cannot be written.
        """

    @abstractmethod
    def discard(self, step: int, writer: str = "") -> None:
        """Remove what a failed save has written, as far as that is possible."""

    def choose(self, warn: Callable[[str], None]) -> Committed | None:
        """The newest checkpoint that verifies.

        Each newer one is told to `warn`; those that are damaged are set aside under a name that says so.

        Raises:
            StorageError: the storage cannot be read.
        """
        with telling():
            candidates = sorted(self._list(), reverse=True)
        for step, attempt in candidates:
            name = checkpoint_name(step, attempt)
            try:
                return self._verified(name)
            except ForeignCheckpointError as error:
                warn(f"checkpoint {name} is skipped: {error}")
            except BadCheckpointError as error:
                warn(f"checkpoint {name} is damaged: {error}; {self._set_aside(name, str(error))}")
        return None

    def holds(self, step: int) -> bool:
        """Whether this attempt, or an older one, has committed this step or a later one."""
        with telling():
            return any(entry >= step and attempt <= self._attempt for entry, attempt in self._list())

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
            self._make_room(snapshot.step, writer)
        files = self.write_part(snapshot, 0, 1, writer)
        return self.commit(snapshot, files, time, writer)

    def write_part(self, snapshot: Snapshot, part: int, parts: int, writer: str = "") -> tuple[FileEntry, ...]:
        """Write one part of a checkpoint: durable, and read back.

        Args:
            snapshot: its tensors are those of this part.
            part: its number, from 0.
            parts: number of parts.
            writer: see `save`.

        Raises:
            SupersededError: a newer attempt has begun.
            StorageError: it could not be written or does not read back.
        """
        with self._guarded():
            return self._write_part(snapshot, part, parts, writer)

    def commit(self, snapshot: Snapshot, files: Iterable[FileEntry], time: float, writer: str = "") -> Committed:
        """Make what was written count, and only then let older checkpoints go.

        Args:
            snapshot: its step and values are written; its tensors are in the files.
            files: the files of all parts.
            time: see `save`.
            writer: see `save`.

        Raises:
            SupersededError: a newer attempt has begun; the checkpoint does not count.
            StorageError: it could not be written, or a part is missing.
        """
        with self._guarded():
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

    def adopt(self, committed: Committed) -> Committed:
        """Copy a checkpoint from another storage of the same job, verify the copy, and let older ones go.

        Raises:
            SupersededError: a newer attempt has begun; the copy does not count.
            StorageError: it could not be copied.
        """
        manifest = committed.manifest
        with self._guarded():
            if self.holds(manifest.step):
                return committed
            best = self.load_values(committed).get(BEST)
            self._make_room(manifest.step, COPY)
            files = self._copy_in(committed)
            plain = manifest.model_copy(update={"files": by_name(files), "attempt": self._attempt})
            copy = self._publish(plain.sealed(), COPY)
            self._check_fence()
            self._prune(copy, best)
        return copy

    def newest(self) -> tuple[int, int]:
        """Step and attempt of the newest that has the name of a checkpoint; (-1, 0) where there is none.

        Raises:
            StorageError: the storage cannot be read.
        """
        with telling():
            return max(self._list(), default=(-1, 0))

    @property
    def behind(self) -> CheckpointStore:
        """The storage that outlives this machine; of most stores it is the store itself."""
        return self

    def load(self, committed: Committed) -> Snapshot:
        """Read a checkpoint that was chosen.

        Raises:
            StorageError: it can no longer be read.
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
        """Read what a checkpoint holds besides tensors.

        Raises:
            StorageError: it can no longer be read.
        """
        files = [committed.folder / entry.name for entry in committed.manifest.files]
        try:
            (state,) = (path for path in files if path.name == STATE)
            return dict(json.loads(state.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise StorageError(f"checkpoint {committed.folder.name} cannot be read: {error}") from error

    @abstractmethod
    def _check_fence(self) -> None:
        """Go on only while no newer attempt has begun."""

    @abstractmethod
    def _list(self) -> list[tuple[int, int]]:
        """Step and attempt of everything with the name of a checkpoint."""

    @abstractmethod
    def _verified(self, name: str) -> Committed:
        """Look at every byte of a checkpoint.

        Raises:
            BadCheckpointError: see `manifest.verify`.
        """

    @abstractmethod
    def _set_aside(self, name: str, why: str) -> str:
        """Keep a damaged checkpoint with the reason where it counts no more; say in words what became of it."""

    @abstractmethod
    def _make_room(self, step: int, writer: str) -> None:
        """Remove what an earlier try of the same writer has left."""

    @abstractmethod
    def _write_part(self, snapshot: Snapshot, part: int, parts: int, writer: str) -> tuple[FileEntry, ...]:
        """See `write_part`."""

    @abstractmethod
    def _copy_in(self, committed: Committed) -> tuple[FileEntry, ...]:
        """Copy the files of another storage's checkpoint: durable, and read back."""

    @abstractmethod
    def _write_state(self, step: int, writer: str, state: bytes, files: tuple[FileEntry, ...]) -> tuple[FileEntry, ...]:
        """Write state.json, see that all parts are there, and return all files in the order of their names."""

    @abstractmethod
    def _publish(self, manifest: Manifest, writer: str) -> Committed:
        """Write the manifest, look at the fence, and make the checkpoint count."""

    @abstractmethod
    def _remove(self, name: str) -> None:
        """Take a checkpoint out of the list first, then delete it: a kill leaves no half that looks whole."""

    def _prune(self, newest: Committed, best: Mapping[str, Any] | None) -> None:
        """Remove what the retention lets go of."""
        entry = (newest.manifest.step, newest.manifest.attempt)
        try:
            best_step = None if best is None else int(best["step"])
            for step, attempt in removable(self._list(), entry, self._retention, best_step):
                name = checkpoint_name(step, attempt)
                self._check_fence()
                self.on_stage(f"{SaveStage.REMOVE} {name}")
                self._remove(name)
        except OSError as error:
            # The newer one is committed; the next save tries again.
            _LOG.warning("checkpoint storage: an old checkpoint cannot be removed: %s", error)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """A newer attempt sweeps away what an older one still writes: then that is the cause of what fails."""
        try:
            with telling():
                yield
        except StorageError:
            with contextlib.suppress(OSError):
                self._check_fence()
            raise


def ordered_names(found: Iterable[str]) -> list[tuple[int, int]]:
    """Step and attempt of those names that are a checkpoint's."""
    matches = (NAME.fullmatch(name) for name in found)
    return [(int(match[1]), int(match[2])) for match in matches if match]


def by_name(files: Iterable[FileEntry]) -> tuple[FileEntry, ...]:
    """Files in the order in which a manifest names them."""
    return tuple(sorted(files, key=lambda file: file.name))


@contextlib.contextmanager
def telling() -> Iterator[None]:
    """Say what is wrong with the storage in one sentence."""
    try:
        yield
    except OSError as error:
        where = error.filename
        what = error.strerror or str(error)
        raise StorageError(f"checkpoint storage: {what}" + (f" ({where})" if where else "")) from error
    except BadCheckpointError as error:
        raise StorageError(f"checkpoint storage: what was written does not read back: {error}") from error
