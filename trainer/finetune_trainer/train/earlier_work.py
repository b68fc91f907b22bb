"""Checkpoints of other jobs that a run starts from (`checkpoint.from`). Only the run's first attempts use it.

The step continues: `training.steps` includes the steps of the other job, and the learning rate follows its schedule at
that step. So a changed setting, or a re-created job, does not repeat what is already trained.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_contract import paths
from finetune_contract.bucket import Bucket, BucketError
from finetune_contract.identity import InputIdentity, describe_change
from finetune_contract.manifest import BadCheckpointError, ForeignCheckpointError, Manifest, read_manifest, verify
from finetune_contract.methods import METHODS
from finetune_contract.run_spec import RunSpec
from finetune_contract.spec import CheckpointSource, Sharding, TrainingSpec
from finetune_trainer.checkpoint.shards import GROUP
from finetune_trainer.checkpoint.snapshot import STATE, Committed
from finetune_trainer.checkpoint.split import group_of
from finetune_trainer.checkpoint.store.base import NAME
from finetune_trainer.checkpoint.store.bucket import fetch_checkpoint
from finetune_trainer.checkpoint.store.select import JobFolders, open_bucket
from finetune_trainer.errors import ConfigError, StorageError

_FIELD = "checkpoint.from"
_FETCHED = "from"
"""Folder, inside the job's local folder, of a checkpoint that is fetched from an object store."""
TRAINING, INPUTS = "training", "inputs"
"""Keys of a checkpoint's values: what it trains, and on what."""


def describe_training(training: TrainingSpec) -> dict[str, Any]:
    """Return the settings that decide whether another job can start from this job's checkpoints."""
    lora = training.lora
    return {
        "method": None if training.method is None else training.method.value,
        "optimizer": training.optimizer.value,
        "alpha": None if lora is None or lora.alpha is None else lora.alpha,
    }


@dataclass(frozen=True)
class FoundPlace:
    """One checkpoint of another job.

    Attributes:
        name: its name.
        folder: its folder on this machine; None if it is in an object store.
        bucket: its folder in an object store.
    """

    name: str
    folder: Path | None
    bucket: Bucket | None

    @property
    def location(self) -> str:
        """Return its path or URL."""
        return str(self.folder) if self.bucket is None else self.bucket.url

    def manifest(self) -> Manifest:
        """Read its manifest.

        Raises:
            BadCheckpointError: it is missing or damaged.
            BucketError: it cannot be read now.
        """
        if self.bucket is None:
            assert self.folder is not None
            return read_manifest(self.folder)
        try:
            return Manifest.model_validate_json(self.bucket.read(paths.MANIFEST))
        except (FileNotFoundError, ValueError) as error:
            raise BadCheckpointError(f"{paths.MANIFEST} is missing or damaged") from error

    def values(self) -> dict[str, Any]:
        """Read its values that are not tensors.

        Raises:
            BadCheckpointError: they are missing or damaged.
        """
        name = next((file.name for file in self.manifest().files if file.name.rpartition("/")[2] == STATE), STATE)
        try:
            if self.bucket is not None:
                return dict(json.loads(self.bucket.read(name)))
            assert self.folder is not None
            return dict(json.loads((self.folder / name).read_bytes()))
        except (FileNotFoundError, ValueError) as error:
            raise BadCheckpointError(f"{name} is missing or damaged") from error

    def fetch(self, local: Path) -> Committed:
        """Return it after every byte was verified; from an object store, it is fetched to a local folder first.

        Raises:
            BadCheckpointError: it is incomplete or damaged.
        """
        uid = self.manifest().job_uid
        if self.bucket is None:
            assert self.folder is not None
            return Committed(self.folder, verify(self.folder, uid))
        return Committed(local / self.name, fetch_checkpoint(self.bucket, local / self.name, uid))


@dataclass(frozen=True)
class EarlierWork:
    """The checkpoint that a run starts from; see `EarlierCheckpoint`.

    Attributes:
        source: the manifest's field.
        spec: the run.
        folders: the run's own folders.
        identities: returns what the run trains on.
        note: receives messages for users.
    """

    source: CheckpointSource
    spec: RunSpec
    folders: JobFolders
    identities: Callable[[], tuple[InputIdentity, ...]]
    note: Callable[[str], None]

    def check(self) -> None:
        """Check the newest checkpoint by its small files, before anything else is loaded.

        Raises:
            ConfigError: there is none, or this run cannot continue from it.
            StorageError: it cannot be read now.
        """
        with _storage_errors():
            for place in self._places():
                try:
                    manifest, values = place.manifest(), place.values()
                except ForeignCheckpointError:
                    raise
                except BadCheckpointError:
                    continue
                self._check_sharding(manifest)
                self._check_values(values)
                return
        raise self._nothing_found()

    def find(self) -> Committed:
        """Return the newest valid checkpoint.

        Raises:
            ConfigError: there is none, or this run cannot continue from it.
            StorageError: it cannot be read now.
        """
        with _storage_errors():
            for place in self._places():
                try:
                    committed = place.fetch(self._local)
                except ForeignCheckpointError:
                    raise
                except BadCheckpointError as error:
                    self.note(f"{_FIELD}: {place.location} is damaged: {error}; an older one is used")
                    continue
                self._check_sharding(committed.manifest)
                self.note(f"{_FIELD}: training continues after step {committed.manifest.step} of {place.location}")
                return committed
        raise self._nothing_found()

    def release(self) -> None:
        """Remove what was fetched."""
        shutil.rmtree(self._local, ignore_errors=True)

    @property
    def _local(self) -> Path:
        return self.folders.job_dir / _FETCHED

    def fits(self, values: Mapping[str, Any]) -> bool:
        """Return whether the optimizer's state fits, and note what differs.

        Raises:
            ConfigError: this run cannot continue from the checkpoint.
        """
        self._check_values(values)
        recorded, now = values.get(TRAINING, {}), describe_training(self.spec.training)
        if recorded.get("alpha", now["alpha"]) != now["alpha"]:
            self.note(
                f"training.lora.alpha: the checkpoint was trained with {recorded['alpha'] or 'the rank'}, so the "
                "strength of the LoRA changes"
            )
        before = {each.field: each for each in map(InputIdentity.model_validate, values.get(INPUTS, ()))}
        for identity in self.identities():
            if identity.field in before and (change := describe_change(before[identity.field], identity)):
                self.note(f"{identity.field}: differs from what the checkpoint was trained on: {change}")
        optimizer = recorded.get("optimizer", now["optimizer"])
        if optimizer != now["optimizer"]:
            self.note(
                f"training.optimizer: the checkpoint has the state of {optimizer}; {now['optimizer']} starts without it"
            )
        return bool(optimizer == now["optimizer"])

    def _check_values(self, values: Mapping[str, Any]) -> None:
        training = self.spec.training
        name = values.get(TRAINING, {}).get("method")
        if name is not None and training.method is not None:
            known = {method.value: traits.trains for method, traits in METHODS.items()}
            if known.get(name) is not METHODS[training.method].trains:
                raise ConfigError(
                    f"{_FIELD}: the checkpoint is one of {name}, and training.method is {training.method.value}; write "
                    f"training.method: {name}, or leave checkpoint.from out"
                )
        if training.steps is not None and values["step"] > training.steps:
            raise ConfigError(
                f"{_FIELD}: the checkpoint contains {values['step']} steps, and training.steps, which includes them, "
                f"is {training.steps}; write a larger number"
            )

    def _check_sharding(self, manifest: Manifest) -> None:
        written = any(group_of(entry.name.rpartition("/")[2]) == GROUP for entry in manifest.files)
        if written != (self.spec.training.sharding is not Sharding.NONE):
            value = Sharding.FULL if written else Sharding.NONE
            raise ConfigError(
                f"{_FIELD}: the checkpoint was written with training.sharding: {value.value}; write "
                f"training.sharding: {value.value}, or leave checkpoint.from out"
            )

    def _places(self) -> list[FoundPlace]:
        """Return all checkpoints of the source, the newest first."""
        source = self.source
        if source.url is not None:
            bucket = open_bucket(source.url)
            assert bucket is not None
            return _in_bucket(bucket)
        return _in_folder(Path(source.path)) if source.path is not None else self._of_job(source.job or "")

    def _of_job(self, job: str) -> list[FoundPlace]:
        """Return the checkpoints of the job of this name; of several jobs, those of the one that saved last."""
        pattern = re.compile(rf"{re.escape(job)}-[0-9a-f]{{8}}")
        if self.folders.bucket is not None:
            parent, _, own = self.folders.bucket.url.rpartition("/")
            bucket = Bucket(parent)
            names = {name.partition("/")[0] for name in bucket.names()}
            jobs = [_in_bucket(bucket.below(name)) for name in names if pattern.fullmatch(name) and name != own]
        else:
            own, folder = self.folders.job_dir.name, self.folders.job_dir.parent
            folders = [each for each in folder.iterdir() if pattern.fullmatch(each.name) and each.name != own]
            jobs = [_in_folder(each) for each in folders]
        return max((places for places in jobs if places), key=_saved_at, default=[])

    def _nothing_found(self) -> ConfigError:
        source = self.source
        if source.job is not None:
            bucket = self.folders.bucket
            where = self.folders.job_dir.parent if bucket is None else bucket.url.rpartition("/")[0]
            return ConfigError(
                f"{_FIELD}.job: {where} contains no checkpoint of a job {source.job}; write the name of a job of this "
                "namespace that used the same storage, or path or url"
            )
        field = "path" if source.path is not None else "url"
        return ConfigError(
            f"{_FIELD}.{field}: {source.path or source.url} contains no complete checkpoint; write the folder of a "
            "job, of its checkpoints, or of one checkpoint"
        )


@contextlib.contextmanager
def _storage_errors() -> Iterator[None]:
    """Translate the errors of a storage that cannot be read now."""
    try:
        yield
    except ForeignCheckpointError as error:
        raise StorageError(f"{_FIELD}: {error}") from error
    except BucketError as error:
        raise StorageError(f"{_FIELD}: {error}") from error
    except OSError as error:
        raise StorageError(f"{_FIELD}: {error.filename} cannot be read: {error.strerror}") from error


def _in_folder(folder: Path) -> list[FoundPlace]:
    if (folder / paths.MANIFEST).is_file():
        return [FoundPlace(folder.name, folder, None)]
    inner = folder / paths.CHECKPOINTS
    folder = inner if inner.is_dir() else folder
    names = [each.name for each in folder.iterdir()] if folder.is_dir() else []
    return [FoundPlace(name, folder / name, None) for name in _newest_first(names)]


def _in_bucket(bucket: Bucket) -> list[FoundPlace]:
    names = bucket.names()
    if paths.MANIFEST in names:
        return [FoundPlace(bucket.url.rpartition("/")[2], None, bucket)]
    start = f"{paths.CHECKPOINTS}/" if any(name.startswith(f"{paths.CHECKPOINTS}/") for name in names) else ""
    corrupt = {name.split("/")[1] for name in names if name.startswith("corrupt/") and name.count("/") > 1}
    complete = {
        name.removeprefix(start).partition("/")[0]
        for name in names
        if name.startswith(start) and name.endswith(f"/{paths.MANIFEST}")
    }
    return [FoundPlace(name, None, bucket.below(f"{start}{name}")) for name in _newest_first(complete - corrupt)]


def _newest_first(names: list[str] | set[str]) -> list[str]:
    """Return the names of checkpoints, by step and attempt."""
    matches = [match for match in map(NAME.fullmatch, names) if match]
    return [match[0] for match in sorted(matches, key=lambda each: (int(each[1]), int(each[2])), reverse=True)]


def _saved_at(places: list[FoundPlace]) -> float:
    """Return the time of a job's newest checkpoint; 0 if it is damaged."""
    try:
        return places[0].manifest().time
    except BadCheckpointError:
        return 0.0
