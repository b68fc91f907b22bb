"""Checkpoints in an object store. Objects cannot be renamed, so the manifest, which is written last, is the commit.

    <job>/fence/attempt-00000002                          see `fence`
    <job>/checkpoints/step-00000040-a2/5f0c.../model.safetensors
    <job>/checkpoints/step-00000040-a2/9e1b.../state.json
    <job>/checkpoints/step-00000040-a2/manifest.json      names the objects above
    <job>/corrupt/step-00000040-a2/reason.txt             marks the checkpoint as damaged: it no longer counts

Each writer uses a new random prefix, so no object is overwritten, and the manifest is written on the condition that
none exists. A checkpoint is fetched to this machine's disk to be verified and read. A copy of the store's folder is a
checkpoint that `finetune checkpoints` can read.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from finetune_contract import paths
from finetune_contract.bucket import Bucket, DamagedObjectError
from finetune_contract.manifest import (
    BadCheckpointError,
    FileEntry,
    ForeignCheckpointError,
    Manifest,
    check_manifest,
    read_manifest,
    verify,
)
from finetune_trainer.checkpoint.snapshot import STATE, Committed, Snapshot
from finetune_trainer.checkpoint.split import file_name
from finetune_trainer.checkpoint.store.base import (
    CheckpointStore,
    by_name,
    checkpoint_name,
    ordered_names,
    storage_errors,
)
from finetune_trainer.checkpoint.store.fence import check_marks
from finetune_trainer.checkpoint.store.retention import Retention
from finetune_trainer.checkpoint.store.stages import SaveStage, write_stage
from finetune_trainer.checkpoint.store.tensor_stream import chunks

_CORRUPT = "corrupt"
_CLAIM = "claims"
_PROBE = "probes"
_BLOCK = 8 * 1024 * 1024
NUM_FETCHES = 4
"""Number of objects fetched at a time, and number of fetches before a checkpoint is treated as damaged."""


class BucketStore(CheckpointStore):
    """The checkpoints of a job in an object store; see `CheckpointStore`.

    Args:
        bucket: the job's folder in the store.
        local: folder on this machine for fetched files; it holds one checkpoint at a time.
        job_uid: see `CheckpointStore`.
        attempt: see `CheckpointStore`.
        retention: see `CheckpointStore`.
    """

    def __init__(
        self,
        bucket: Bucket,
        local: Path,
        job_uid: str,
        attempt: int,
        retention: Retention,
    ) -> None:
        super().__init__(job_uid, attempt, retention)
        self._bucket = bucket
        self._checkpoints = bucket.below(paths.CHECKPOINTS)
        self._local = local

    def open(self) -> None:
        """Mark the attempt, and remove objects that no manifest names."""
        with storage_errors():
            self._bucket.put_new(f"{paths.FENCE}/{paths.fence_mark(self._attempt)}", b"")
            self._check_fence()
            names = self._checkpoints.names()
            complete = {name.partition("/")[0] for name in names if name.endswith(f"/{paths.MANIFEST}")}
            self._checkpoints.remove([name for name in names if name.partition("/")[0] not in complete])
            for folder in (_CLAIM, _PROBE):
                below = self._bucket.below(folder)
                below.remove(below.names())

    def put_probe(self) -> str:
        """Create an object with a new name."""
        name = secrets.token_hex(8)
        with storage_errors():
            self._bucket.put(f"{_PROBE}/{name}", b"")
        return name

    def has_probe(self, name: str) -> bool:
        """Return whether the object exists in this rank's bucket, too."""
        with storage_errors():
            return self._bucket.exists(f"{_PROBE}/{name}")

    def remove_probe(self, name: str) -> None:
        """Remove the object, if possible."""
        with contextlib.suppress(OSError):
            self._bucket.remove([f"{_PROBE}/{name}"])

    def find(self, name: str) -> Committed:
        """Fetch the checkpoint to this rank's folder."""
        with storage_errors():
            return self._verified(name)

    def num_corrupt(self) -> int:
        """Return how many checkpoints are marked as damaged."""
        with contextlib.suppress(OSError):
            return len(self._corrupt())
        return 0

    def claim(self, step: int) -> bool:
        """Write an object on the condition that none exists."""
        with storage_errors():
            return self._bucket.put_new(f"{_CLAIM}/{checkpoint_name(step, self._attempt)}", b"")

    def discard(self, step: int, writer: str = "") -> None:
        """Remove the objects of the step unless it has a manifest; another writer may have committed it."""
        del writer
        name = checkpoint_name(step, self._attempt)
        with contextlib.suppress(OSError):
            found = [each for each in self._checkpoints.names() if each.startswith(f"{name}/")]
            if f"{name}/{paths.MANIFEST}" not in found:
                self._checkpoints.remove(found)

    def _check_fence(self) -> None:
        check_marks(self._bucket.below(paths.FENCE).names(), self._attempt)

    def _corrupt(self) -> set[str]:
        return {name.partition("/")[0] for name in self._bucket.below(_CORRUPT).names()}

    def _list(self) -> list[tuple[int, int]]:
        end = f"/{paths.MANIFEST}"
        complete = {name.removesuffix(end) for name in self._checkpoints.names() if name.endswith(end)}
        return ordered_names(complete - self._corrupt())

    def _verified(self, name: str) -> Committed:
        """Fetch the checkpoint and verify the copy; a damaged transfer is repeated."""
        folder, bucket = self._local / name, self._checkpoints.below(name)
        for left in reversed(range(NUM_FETCHES)):
            shutil.rmtree(self._local, ignore_errors=True)
            try:
                return Committed(folder, fetch_checkpoint(bucket, folder, self._job_uid))
            except ForeignCheckpointError:
                raise
            except BadCheckpointError:
                if left == 0:
                    raise
        raise AssertionError

    def _quarantine(self, name: str, why: str) -> str:
        """Mark the checkpoint as damaged, with the reason."""
        try:
            self._bucket.put(f"{_CORRUPT}/{name}/{paths.CORRUPT_REASON}", f"{why}\n".encode())
        except OSError as error:
            return f"it cannot be marked as damaged ({error}) and is skipped"
        return f"marked as damaged by {_CORRUPT}/{name}/{paths.CORRUPT_REASON}"

    def _clear_leftovers(self, step: int, writer: str) -> None:
        """Do nothing: every try uses a new prefix."""

    def _write_part(self, snapshot: Snapshot, part: int, parts: int, writer: str) -> tuple[FileEntry, ...]:
        below = f"{secrets.token_hex(6)}{writer}"
        name, files = checkpoint_name(snapshot.step, self._attempt), []
        for group, each in sorted(snapshot.tensors.items()):
            self.on_stage(write_stage(group))
            digest, size = hashlib.sha256(), 0
            entry = f"{below}/{file_name(group, part, parts)}"
            with self._checkpoints.create(f"{name}/{entry}") as target:
                for chunk in chunks(each, snapshot.offsets):
                    digest.update(chunk)
                    target.write(chunk)
                    size += len(chunk)
            files.append(FileEntry(name=entry, size_bytes=size, sha256=digest.hexdigest()))
        self.on_stage(SaveStage.READ_BACK)
        for file in files:
            self._read_back(name, file)
        return tuple(files)

    def _import_files(self, committed: Committed) -> tuple[FileEntry, ...]:
        name = checkpoint_name(committed.manifest.step, self._attempt)
        below = secrets.token_hex(6)
        files = []
        for entry in committed.manifest.files:
            copy = entry.model_copy(update={"name": f"{below}/{entry.name.rpartition('/')[2]}"})
            self._checkpoints.upload(f"{name}/{copy.name}", committed.folder / entry.name)
            self._read_back(name, copy)
            files.append(copy)
        return tuple(files)

    def _write_state(self, step: int, writer: str, state: bytes, files: tuple[FileEntry, ...]) -> tuple[FileEntry, ...]:
        name = checkpoint_name(step, self._attempt)
        entry = FileEntry(
            name=f"{secrets.token_hex(6)}{writer}/{STATE}",
            size_bytes=len(state),
            sha256=hashlib.sha256(state).hexdigest(),
        )
        self._checkpoints.put(f"{name}/{entry.name}", state)
        self._read_back(name, entry)
        for file in files:
            # Another rank has read its part back; check that it is visible from here, too.
            _check_size(self._checkpoints.below(name), file)
        return by_name((*files, entry))

    def _publish(self, manifest: Manifest, writer: str) -> Committed:
        self.on_stage(SaveStage.CHECK_FENCE)
        self._check_fence()
        self.on_stage(SaveStage.WRITE_MANIFEST)
        name = checkpoint_name(manifest.step, manifest.attempt)
        if not self._checkpoints.put_new(f"{name}/{paths.MANIFEST}", manifest.model_dump_json(indent=1).encode()):
            # A survivor of the same attempt wrote the same state, or this request succeeded and was then repeated.
            manifest = self._verified(name).manifest
        return Committed(self._local / name, manifest)

    def _remove(self, name: str) -> None:
        """Delete the manifest first."""
        self._checkpoints.remove([f"{name}/{paths.MANIFEST}"])
        self.on_stage(SaveStage.DELETE)
        self._checkpoints.remove([each for each in self._checkpoints.names() if each.startswith(f"{name}/")])

    def _read_back(self, name: str, entry: FileEntry) -> None:
        _check_size(self._checkpoints.below(name), entry)
        digest = hashlib.sha256()
        with self._checkpoints.open(f"{name}/{entry.name}") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        if digest.hexdigest() != entry.sha256:
            raise BadCheckpointError(f"{entry.name} does not match its SHA-256")


def _check_size(bucket: Bucket, entry: FileEntry) -> None:
    try:
        size = bucket.size_bytes(entry.name)
    except FileNotFoundError as error:
        raise BadCheckpointError(f"{entry.name} is missing") from error
    if size != entry.size_bytes:
        raise BadCheckpointError(f"{entry.name} has {size} bytes instead of {entry.size_bytes}")


def _download(bucket: Bucket, entry: FileEntry, folder: Path) -> None:
    _check_size(bucket, entry)
    try:
        bucket.download(entry.name, folder / entry.name)
    except DamagedObjectError as error:
        raise BadCheckpointError(f"{entry.name} does not match its SHA-256: {error}") from error


def fetch_checkpoint(bucket: Bucket, folder: Path, job_uid: str) -> Manifest:
    """Fetch a checkpoint to this machine, and verify it here.

    Raises:
        BadCheckpointError: see `manifest.verify`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        (folder / paths.MANIFEST).write_bytes(bucket.read(paths.MANIFEST))
        manifest = read_manifest(folder)
        check_manifest(manifest, job_uid)
        with ThreadPoolExecutor(NUM_FETCHES) as pool:
            list(pool.map(lambda entry: _download(bucket, entry, folder), manifest.files))
    except FileNotFoundError as error:
        raise BadCheckpointError(f"{paths.MANIFEST} is missing") from error
    except DamagedObjectError as error:
        raise BadCheckpointError(f"{paths.MANIFEST} is damaged: {error}") from error
    except OSError as error:
        raise ForeignCheckpointError(f"it cannot be fetched: {error}") from error
    return verify(folder, job_uid)
