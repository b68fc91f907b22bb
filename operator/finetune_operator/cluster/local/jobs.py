"""Creates, reads and removes jobs in the state folder. Blocking: call in a thread."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path
from typing import Any

from finetune_contract.paths import job_folder
from finetune_operator.api.job import FineTuneJob, FineTuneJobSpec, ObjectMeta
from finetune_operator.cluster.local.files import Warn, read_json, read_or_recover, write_json
from finetune_operator.cluster.local.home import Home, JobFolder
from finetune_operator.cluster.local.kubelet.launch import find_pods, kill_and_remove
from finetune_operator.cluster.protocol import Clock, JobKey


def key_of(job: FineTuneJob) -> JobKey:
    """Return the key of a job."""
    return JobKey(job.metadata.namespace, job.metadata.name)


def with_spec(job: FineTuneJob, spec: FineTuneJobSpec) -> FineTuneJob:
    """Return a job with a new spec and the next generation."""
    meta = job.metadata
    return job.model_copy(
        update={"spec": spec, "metadata": meta.model_copy(update={"generation": meta.generation + 1})}
    )


def parse_stored(value: Any) -> FineTuneJob:
    """Parse a stored job.

    Raises:
        ValueError: the value is not a job.
    """
    return FineTuneJob.model_validate(value)


def store_job(folder: JobFolder, job: FineTuneJob) -> None:
    """Write a job and keep the previous version."""
    write_json(folder.job, job.model_dump(mode="json", by_alias=True, exclude_none=True), keep_previous=True)


def read_job(home: Home, key: JobKey) -> FineTuneJob | None:
    """Return a job without changing anything on disk; None if it does not exist.

    Raises:
        BrokenFileError: the content of its file is invalid.
    """
    return read_json(home.job(key).job, parse_stored)


def load_job(home: Home, key: JobKey, warn: Warn) -> FineTuneJob | None:
    """Read a job as the holder of its lock: rename a broken file and use the previous version."""
    return read_or_recover(home.job(key).job, parse_stored, warn)


def create_job(home: Home, job: FineTuneJob, now: Clock) -> FineTuneJob:
    """Store a job as the API server would: with a new identity and no status. Remove files of an earlier, lost job."""
    key = key_of(job)
    clear_folder(home.job(key))
    meta = ObjectMeta(
        name=key.name,
        namespace=key.namespace,
        uid=str(uuid.uuid4()),
        resource_version="1",
        creation_timestamp=now(),
        labels=job.metadata.labels,
        annotations=job.metadata.annotations,
    )
    created = FineTuneJob(metadata=meta, spec=job.spec)
    store_job(home.job(key), created)
    return created


def storage_folder(home: Home, job: FineTuneJob) -> Path:
    """Return the folder of a job's checkpoints on this machine."""
    storage = job.spec.checkpoint.storage
    root = home.storage
    if storage is not None and storage.host_path is not None:
        root = Path(storage.host_path.path)
    elif storage is not None and storage.persistent_volume_claim is not None:
        root = home.claim(storage.persistent_volume_claim.claim_name)
    return root / job_folder(job.metadata.namespace, job.metadata.name, job.metadata.uid)


def clear_folder(folder: JobFolder) -> None:
    """Kill the pods of a job that no process runs. Remove its files except for the lock and renamed broken files."""
    for files in find_pods(folder.pods):
        kill_and_remove(files.folder)
    for path in folder.path.iterdir() if folder.path.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path != folder.lock and ".broken-" not in path.name:
            path.unlink(missing_ok=True)


def remove_job(home: Home, key: JobKey) -> None:
    """Remove a job completely, its lock last. The caller holds the lock."""
    folder = home.job(key)
    clear_folder(folder)
    shutil.rmtree(folder.path, ignore_errors=True)
