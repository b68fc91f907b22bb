"""Selects the kind of storage for a job's checkpoints. Called once by each rank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from finetune_contract import paths
from finetune_contract.bucket import Bucket
from finetune_contract.run_spec import RunSpec
from finetune_trainer.checkpoint.store.base import CheckpointStore, ordered_names, storage_errors
from finetune_trainer.checkpoint.store.bucket import BucketStore
from finetune_trainer.checkpoint.store.folder import FolderStore
from finetune_trainer.checkpoint.store.retention import Retention
from finetune_trainer.checkpoint.store.scratch import ScratchStore
from finetune_trainer.errors import ConfigError

_FETCHED = "fetched"
"""Folder, inside the job's local folder, of checkpoints that were fetched from an object store."""


@dataclass(frozen=True)
class JobFolders:
    """The job's folders, as a rank sees them.

    Attributes:
        job_dir: folder on the pods' storage.
        scratch: folder on this node's own disk, if checkpoints go there first.
        bucket: folder in an object store, if checkpoints go there; `job_dir` then holds a copy.
    """

    job_dir: Path
    scratch: Path | None = None
    bucket: Bucket | None = None


def open_bucket(url: str | None) -> Bucket | None:
    """Open the job's folder in an object store; return None if the job has none.

    Raises:
        ConfigError: it cannot be opened: a package is missing, or the URL is invalid.
    """
    if url is None:
        return None
    try:
        return Bucket(url)
    except OSError as error:
        raise ConfigError(f"spec.checkpoint.storage.bucket: {error}") from error


def has_checkpoints(folders: JobFolders) -> bool:
    """Return whether the job has a checkpoint anywhere that this rank can see; it may be damaged.

    Raises:
        StorageError: a folder cannot be read.
    """
    with storage_errors():
        for job_dir in (folders.job_dir, folders.scratch):
            folder = None if job_dir is None else paths.checkpoints(job_dir)
            if folder is not None and folder.is_dir() and ordered_names(each.name for each in folder.iterdir()):
                return True
        if folders.bucket is None:
            return False
        return any(name.endswith(f"/{paths.MANIFEST}") for name in folders.bucket.below(paths.CHECKPOINTS).names())


def make_store(spec: RunSpec, attempt: int, folders: JobFolders, rank: int) -> CheckpointStore:
    """Return the store of one rank.

    Args:
        spec: the run.
        attempt: number of this attempt.
        folders: the job's folders.
        rank: the rank; ranks of one node use separate folders, so that none empties another's.
    """
    retention = Retention(spec.keep, spec.keep_every_steps, spec.keep_best)
    store: CheckpointStore
    if folders.bucket is None:
        store = FolderStore(folders.job_dir, spec.uid, attempt, retention)
    else:
        local = folders.job_dir / _FETCHED / f"rank-{rank}"
        store = BucketStore(folders.bucket, local, spec.uid, attempt, retention)
    if folders.scratch is None:
        return store
    return ScratchStore(folders.scratch, store, spec.uid, attempt, reads_durable=rank == 0)
