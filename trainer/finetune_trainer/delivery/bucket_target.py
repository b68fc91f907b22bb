"""Delivers an output to a folder of an object store.

    s3://models/lora/circles.safetensors           the files of the output
    s3://models/lora/circles.kohya.output.json     the last object: the files with their sizes and SHA-256

All parts of all files are stored first, in parallel; no reader sees them. Then the objects are made, one request each,
and the record is the last one. A reader that waits for the record sees complete outputs only; one that does not sees
complete objects only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from finetune_contract.bucket import Bucket, BucketError
from finetune_trainer import patience
from finetune_trainer.delivery.claims import conflict_message, describe_other, is_named_after_job
from finetune_trainer.delivery.parts.azure import AzureParts
from finetune_trainer.delivery.parts.base import (
    MIN_PART_BYTES,
    PartStore,
    PendingUpload,
    UploadPart,
    iterate_md5,
    read_part,
    split,
)
from finetune_trainer.delivery.parts.gcs import GcsParts
from finetune_trainer.delivery.parts.s3 import S3Parts
from finetune_trainer.delivery.staged import MARKER_END, OutputFile, OutputRecord, StagedOutput
from finetune_trainer.delivery.target import ExportStage, OnExportStage, TransferProgress
from finetune_trainer.errors import ConfigError, StorageError

NUM_UPLOADS = 8
"""Number of parts that are sent at a time."""
_STORES: Mapping[str, Callable[[Bucket], PartStore]] = {"s3": S3Parts, "gs": GcsParts, "az": AzureParts}
_REMEDY = (
    "write a location that its credentials may write to, or give the credentials of the target in outputs[].secret or "
    "spec.secrets"
)

T = TypeVar("T")


@dataclass(frozen=True)
class UploadLimits:
    """Limits of the uploads of one target."""

    min_part_bytes: int = MIN_PART_BYTES
    """Smallest part, except for the last one of a file."""
    num_uploads: int = NUM_UPLOADS
    """Number of parts that are sent at a time."""


@dataclass
class _Transfer:
    """The upload of one file.

    Attributes:
        file: the file.
        upload: the upload at the store.
        parts: all parts of the file.
        stored: the store's tag of each part that is stored, by its number.
    """

    file: OutputFile
    upload: PendingUpload
    parts: Sequence[UploadPart]
    stored: dict[int, str] = field(default_factory=dict)

    @property
    def missing(self) -> list[UploadPart]:
        """The parts that are not stored yet."""
        return [part for part in self.parts if part.number not in self.stored]


class BucketTarget:
    """A folder of an object store; see `Target`.

    Args:
        field: field of the manifest, for messages, e.g. 'outputs[0].to'.
        location: URL of the folder.
        job: namespace and name of the job.
        credentials: variables of the Secret of this target; empty: those of the environment.
        limits: of its uploads.

    Raises:
        ConfigError: the client of the store cannot be opened.
    """

    def __init__(
        self,
        field: str,
        location: str,
        job: tuple[str, str],
        credentials: Mapping[str, str],
        limits: UploadLimits = UploadLimits(),
    ) -> None:
        self.location = location.rstrip("/")
        self._field = field
        self._job = job
        self._limits = limits
        try:
            # The parts have their own checksums: each byte is hashed once.
            self._bucket = Bucket(self.location, credentials, adds_checksums=False)
        except (BucketError, ValueError) as error:
            raise ConfigError(f"{field}: {error}") from error
        self._store = _STORES[location.partition("://")[0]](self._bucket)
        self._lock = threading.Lock()

    def check(self, names: Sequence[str]) -> None:
        """Store something invisible, and look for an output of another job."""
        self._permanent(f"checking {self.location}", self._store.probe)
        if self._permanent(f"checking {self.location}", self._is_object):
            raise ConfigError(
                f"{self._field}: {self.location} is the name of an object; write a folder, e.g. {self.location}-outputs"
            )
        for record in self._foreign():
            files = {file.name for file in record.files}
            # Files that are not named after their job are likely to replace each other.
            unclear = not names and not is_named_after_job(record.job, files)
            if unclear or not files.isdisjoint(names):
                raise self._taken(record)

    def holds(self, record: OutputRecord) -> bool:
        """Compare the record, and size and SHA-256 of each object."""

        def compare() -> bool:
            try:
                found = OutputRecord.parse(self._bucket.read(record.marker))
            except FileNotFoundError:
                return False
            return found == record and all(self._has(file) for file in record.files)

        return self._wait_out(f"reading {self.location}", compare)

    def deliver(self, output: StagedOutput, on_stage: OnExportStage, progress: TransferProgress) -> None:
        """Store all parts, then make the objects."""
        record = output.record
        ours = {file.name for file in record.files}
        if taken := next((one for one in self._foreign() if ours & {file.name for file in one.files}), None):
            raise self._taken(taken)
        transfers = [self._resume(output, file) for file in record.files if not self._has_now(file)]
        self._send(output, transfers, on_stage, progress)
        on_stage(ExportStage.UPLOADED)
        earlier = self._earlier(record)
        for transfer in transfers:
            self._publish(transfer)
            on_stage(ExportStage.PUBLISH)
        text = record.model_dump_json(by_alias=True, indent=1).encode()
        self._permanent(f"writing {record.marker}", lambda: self._bucket.put(record.marker, text))
        on_stage(ExportStage.PUBLISH)
        self._clean(record, earlier)

    def _resume(self, output: StagedOutput, file: OutputFile) -> _Transfer:
        """Return the upload to continue, with the parts that already have the contents of this file; abort others."""
        parts = split(file.size_bytes, self._store.max_parts, self._limits.min_part_bytes)
        chosen: _Transfer | None = None
        for upload in self._find(file):
            stored = [part for part in parts if part.number in upload.parts]
            local = dict(iterate_md5(output.path(file), stored)) if chosen is None else {}
            if local and all(upload.parts[number] == md5 for number, md5 in local.items()):
                chosen = _Transfer(file, upload, parts, local)
            else:
                self._permanent(f"cleaning up {file.name}", partial(self._store.abort, upload))
        return chosen or _Transfer(file, self._begin(file), parts)

    def _find(self, file: OutputFile) -> list[PendingUpload]:
        """Return unfinished uploads. Without the permission to list them, every upload begins at its start."""
        try:
            return self._wait_out(f"listing uploads of {file.name}", lambda: self._store.find(file.name, file.sha256))
        except BucketError:
            return []

    def _begin(self, file: OutputFile) -> PendingUpload:
        return self._permanent(f"uploading {file.name}", lambda: self._store.begin(file.name, file.sha256))

    def _send(
        self,
        output: StagedOutput,
        transfers: Sequence[_Transfer],
        on_stage: OnExportStage,
        progress: TransferProgress,
    ) -> None:
        """Send all missing parts, several at a time."""
        total = output.record.size_bytes
        missing = [(transfer, part) for transfer in transfers for part in transfer.missing]
        done = total - sum(part.size_bytes for _, part in missing)
        progress(done, total)

        def send(item: tuple[_Transfer, UploadPart]) -> None:
            nonlocal done
            transfer, part = item
            data = read_part(output.path(transfer.file), part)
            tag = self._permanent(
                f"uploading {transfer.file.name}", lambda: self._store.put(transfer.upload, part, data)
            )
            with self._lock:
                transfer.stored[part.number] = tag
                done += part.size_bytes
                progress(done, total)
                on_stage(ExportStage.UPLOAD)

        with ThreadPoolExecutor(self._limits.num_uploads, thread_name_prefix="upload") as pool:
            tasks = [pool.submit(send, item) for item in missing]
            try:
                for task in tasks:
                    task.result()
            except BaseException:
                for task in tasks:
                    task.cancel()
                raise

    def _publish(self, transfer: _Transfer) -> None:
        """Make the object. A repeated request that fails because the first one succeeded is a success."""

        def commit() -> None:
            try:
                self._store.commit(transfer.upload, transfer.stored)
            except BucketError:
                if not self._has(transfer.file):
                    raise

        self._permanent(f"completing {transfer.file.name}", commit)
        if not self._has_now(transfer.file):
            raise StorageError(
                f"{self._field}: {self.location}/{transfer.file.name} differs from what was uploaded; does another "
                "program write to it?"
            )

    def _clean(self, record: OutputRecord, earlier: OutputRecord | None) -> None:
        """Remove unfinished uploads of the output's files, and files of the job's earlier output that it replaces."""
        for file in record.files:
            for upload in self._find(file):
                self._permanent(f"cleaning up {file.name}", partial(self._store.abort, upload))
        names = {file.name for file in record.files}
        stale = [file.name for file in earlier.files if file.name not in names] if earlier is not None else []
        if stale:
            self._permanent(f"removing earlier files of {self.location}", lambda: self._bucket.remove(stale))

    def _earlier(self, record: OutputRecord) -> OutputRecord | None:
        """Return the record of the output that this one replaces."""

        def read() -> OutputRecord | None:
            try:
                return OutputRecord.parse(self._bucket.read(record.marker))
            except FileNotFoundError:
                return None

        return self._wait_out(f"reading {self.location}", read)

    def _foreign(self) -> list[OutputRecord]:
        """Return the records of other jobs in this folder; none if it may not be listed."""

        def read() -> list[OutputRecord]:
            with self._bucket.translating_errors("cannot be read"):
                listed = self._bucket.client.ls(self._bucket.root, detail=False)
            names = [path.rpartition("/")[2] for path in listed if path.endswith(MARKER_END)]
            found = (OutputRecord.parse(self._bucket.read(name)) for name in names)
            return [record for record in found if record is not None and (record.namespace, record.job) != self._job]

        try:
            return self._wait_out(f"listing {self.location}", read)
        except OSError:
            # There is no such folder yet, or it may not be listed.
            return []

    def _taken(self, record: OutputRecord) -> ConfigError:
        conflict = describe_other(record.namespace, record.job)
        return ConfigError(conflict_message(self._field, self.location, conflict))

    def _has_now(self, file: OutputFile) -> bool:
        return self._wait_out(f"reading {file.name}", lambda: self._has(file))

    def _has(self, file: OutputFile) -> bool:
        return self._store.sha256_of(file.name) == (file.size_bytes, file.sha256)

    def _is_object(self) -> bool:
        path = self._bucket.root
        with self._bucket.translating_errors("cannot be read"):
            return "/" in path and bool(self._bucket.client.isfile(path))

    def _permanent(self, what: str, action: Callable[[], T]) -> T:
        """Wait out outages of a request. What is left is refused for good.

        Raises:
            ConfigError: the store refuses the request.
        """
        try:
            return self._wait_out(what, action)
        except OSError as error:
            raise ConfigError(f"{self._field}: {str(error).rstrip('.')}; {_REMEDY}") from error

    def _wait_out(self, what: str, action: Callable[[], T]) -> T:
        return patience.wait_out(f"{self._field}: {what}", action)
