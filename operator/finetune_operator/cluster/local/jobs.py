"""Jobs in the state folder, for those who do not run them: found, read, made, removed. Blocking."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path
from typing import Any

from finetune_contract.paths import job_folder
from finetune_operator.api.job import FineTuneJob, FineTuneJobSpec, ObjectMeta
from finetune_operator.cluster.local.files import Warn, read_json, recover, write_json
from finetune_operator.cluster.local.home import Home, JobFolder
from finetune_operator.cluster.local.kubelet.launch import clear_away, pod_folders
from finetune_operator.cluster.protocol import Clock, JobKey


def key_of(job: FineTuneJob) -> JobKey:
    """The key of a job."""
    return JobKey(job.metadata.namespace, job.metadata.name)


def with_spec(job: FineTuneJob, spec: FineTuneJobSpec) -> FineTuneJob:
    """A job with another spec and so with the next generation."""
    meta = job.metadata
    return job.model_copy(
        update={"spec": spec, "metadata": meta.model_copy(update={"generation": meta.generation + 1})}
    )


def parse_stored(value: Any) -> FineTuneJob:
    """Read a stored job.

    Raises:
        ValueError: it is none.
    """
    return FineTuneJob.model_validate(value)


def store_job(folder: JobFolder, job: FineTuneJob) -> None:
    """Write a job, and keep the version before."""
    write_json(folder.job, job.model_dump(mode="json", by_alias=True, exclude_none=True), keep_previous=True)


def read_job(home: Home, key: JobKey) -> FineTuneJob | None:
    """Read a job without touching anything; None where there is none.

    Raises:
        BrokenFileError: its file is broken.
    """
    return read_json(home.job(key).job, parse_stored)


def take_job(home: Home, key: JobKey, warn: Warn) -> FineTuneJob | None:
    """Read a job as the holder of its lock: a broken file is set aside and the version before it is used."""
    return recover(home.job(key).job, parse_stored, warn)


def create_job(home: Home, job: FineTuneJob, now: Clock) -> FineTuneJob:
    """Store a job as the API server would: a fresh identity, no status. What a lost one left behind goes."""
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
    fresh = FineTuneJob(metadata=meta, spec=job.spec)
    store_job(home.job(key), fresh)
    return fresh


def storage_folder(home: Home, job: FineTuneJob) -> Path:
    """Folder of a job's checkpoints on this machine."""
    storage = job.spec.checkpoint.storage
    root = home.storage
    if storage is not None and storage.host_path is not None:
        root = Path(storage.host_path.path)
    elif storage is not None and storage.persistent_volume_claim is not None:
        root = home.claim(storage.persistent_volume_claim.claim_name)
    return root / job_folder(job.metadata.namespace, job.metadata.name, job.metadata.uid)


def clear_folder(folder: JobFolder) -> None:
    """End the pods of a job that nobody drives and remove all of it but the lock and what was set aside."""
    for files in pod_folders(folder.pods):
        clear_away(files.folder)
    for path in folder.path.iterdir() if folder.path.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path != folder.lock and ".broken-" not in path.name:
            path.unlink(missing_ok=True)


def remove_job(home: Home, key: JobKey) -> None:
    """Remove all of a job, its lock at last. The caller holds that."""
    folder = home.job(key)
    clear_folder(folder)
    shutil.rmtree(folder.path, ignore_errors=True)
