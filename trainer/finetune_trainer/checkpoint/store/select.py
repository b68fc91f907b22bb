"""Which kind of storage a job's checkpoints go to. Called by `run`, once for each rank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from finetune_contract.bucket import Bucket
from finetune_contract.run_spec import RunSpec
from finetune_trainer.checkpoint.store.base import CheckpointStore
from finetune_trainer.checkpoint.store.bucket import BucketStore
from finetune_trainer.checkpoint.store.folder import FolderStore
from finetune_trainer.checkpoint.store.retention import Retention
from finetune_trainer.checkpoint.store.scratch import ScratchStore
from finetune_trainer.errors import ConfigError

_FETCHED = "fetched"
"""Folder, in the job's local one, of what was brought from an object store."""


@dataclass(frozen=True)
class Places:
    """The job's folders, as a rank sees them.

    Attributes:
        job_dir: on the pods' storage.
        scratch: on this node's own disk, where checkpoints go there first.
        bucket: in an object store, where checkpoints go there; then what is in `job_dir` is a copy.
    """

    job_dir: Path
    scratch: Path | None = None
    bucket: Bucket | None = None


def open_bucket(url: str | None) -> Bucket | None:
    """The job's folder in an object store, where it has one.

    Raises:
        ConfigError: it cannot be opened: a package is missing, or the URL is none.
    """
    if url is None:
        return None
    try:
        return Bucket(url)
    except OSError as error:
        raise ConfigError(f"spec.checkpoint.storage.bucket: {error}") from error


def make_store(spec: RunSpec, attempt: int, places: Places, rank: int) -> CheckpointStore:
    """The store of one rank.

    Args:
        spec: the run.
        attempt: which attempt this is.
        places: the job's folders.
        rank: number of the rank; ranks of one node must not empty each other's folders.
    """
    retention = Retention(spec.keep, spec.keep_every_steps, spec.keep_best)
    store: CheckpointStore
    if places.bucket is None:
        store = FolderStore(places.job_dir, spec.uid, attempt, retention)
    else:
        local = places.job_dir / _FETCHED / f"rank-{rank}"
        store = BucketStore(places.bucket, local, spec.uid, attempt, retention)
    if places.scratch is None:
        return store
    return ScratchStore(places.scratch, store, spec.uid, attempt, reads_behind=rank == 0)
