"""The manifest that makes a checkpoint count, and the check of a checkpoint against it."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from finetune_contract import paths

FORMAT_VERSION = 2
"""1: one file for each group of tensors. 2: a group may be split over several."""
VERIFY_THREADS = 4


class FileEntry(BaseModel):
    """One file of a checkpoint."""

    model_config = ConfigDict(frozen=True)

    name: str
    """Below the checkpoint's folder; with '/' between its parts where it is not right in it."""
    size_bytes: int = Field(ge=0)
    sha256: str

    @field_validator("name")
    @classmethod
    def _stays_below(cls, name: str) -> str:
        """What is fetched by its name must not land elsewhere."""
        if name.startswith("/") or not {"", ".", ".."}.isdisjoint(name.split("/")):
            raise ValueError(f"{name!r} is no name below a folder")
        return name


class Manifest(BaseModel):
    """What a whole checkpoint consists of."""

    model_config = ConfigDict(frozen=True)

    format_version: int = FORMAT_VERSION
    job_uid: str
    attempt: int = Field(ge=1)
    step: int = Field(ge=0)
    time: float
    """When it was written, seconds since the epoch."""
    files: tuple[FileEntry, ...]
    sha256: str = ""
    """Of the manifest itself without this field; empty in format 1."""

    def sealed(self) -> Manifest:
        """The same manifest with its own hash."""
        return self.model_copy(update={"sha256": self._digest()})

    @property
    def is_intact(self) -> bool:
        """Whether it says what it said when it was sealed."""
        return self.format_version == 1 or self.sha256 == self._digest()

    def _digest(self) -> str:
        return hashlib.sha256(self.model_dump_json(exclude={"sha256"}).encode()).hexdigest()


class BadCheckpointError(Exception):
    """A folder is no whole checkpoint of this job; the text names the file and what is wrong with it."""


class ForeignCheckpointError(BadCheckpointError):
    """It is not for this trainer to judge: of another job, of a newer format, or not readable at the moment."""


def verify(folder: Path, job_uid: str) -> Manifest:
    """Check every file of a checkpoint against its manifest.

    Raises:
        ForeignCheckpointError: it is not this job's, of a newer format, or cannot be read at the moment.
        BadCheckpointError: it is not whole.
    """
    manifest = read_manifest(folder)
    check_manifest(manifest, job_uid)
    for entry in manifest.files:
        verify_size(folder, entry)
    with ThreadPoolExecutor(VERIFY_THREADS) as pool:
        list(pool.map(lambda entry: verify_file(folder, entry), manifest.files))
    return manifest


def check_manifest(manifest: Manifest, job_uid: str) -> None:
    """Check what a manifest says of itself.

    Raises:
        ForeignCheckpointError: it is of another job, or of a newer format.
        BadCheckpointError: it is damaged.
    """
    if manifest.format_version > FORMAT_VERSION:
        raise ForeignCheckpointError(
            f"{paths.MANIFEST} has format {manifest.format_version}, and this trainer reads up to {FORMAT_VERSION}"
        )
    if not manifest.is_intact:
        raise BadCheckpointError(f"{paths.MANIFEST} is damaged")
    if manifest.job_uid != job_uid:
        raise ForeignCheckpointError(f"{paths.MANIFEST} belongs to another job ({manifest.job_uid})")


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest.

    Raises:
        ForeignCheckpointError: it cannot be read at the moment.
        BadCheckpointError: there is none, or it is damaged.
    """
    try:
        return Manifest.model_validate_json((folder / paths.MANIFEST).read_bytes())
    except (FileNotFoundError, IsADirectoryError) as error:
        raise BadCheckpointError(f"{paths.MANIFEST} is missing") from error
    except OSError as error:
        raise ForeignCheckpointError(f"{paths.MANIFEST} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise BadCheckpointError(f"{paths.MANIFEST} is damaged") from error


def verify_size(folder: Path, entry: FileEntry) -> None:
    """Check that a file is there with its size.

    Raises:
        ForeignCheckpointError: it cannot be looked at.
        BadCheckpointError: it is missing, or has another size.
    """
    try:
        size = (folder / entry.name).stat().st_size
    except FileNotFoundError as error:
        raise BadCheckpointError(f"{entry.name} is missing") from error
    except OSError as error:
        raise ForeignCheckpointError(f"{entry.name} cannot be read: {error.strerror}") from error
    if size != entry.size_bytes:
        raise BadCheckpointError(f"{entry.name} has {size} bytes in place of {entry.size_bytes}")


def verify_file(folder: Path, entry: FileEntry, from_disk: bool = False) -> None:
    """Check a file against its size and hash.

    Args:
        folder: where it is.
        entry: what it should be.
        from_disk: ask the system to forget what it has of the file in memory, so that the disk is read.

    Raises:
        ForeignCheckpointError: it cannot be read.
        BadCheckpointError: it is missing, or has other contents.
    """
    verify_size(folder, entry)
    try:
        with (folder / entry.name).open("rb") as file:
            if from_disk:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise BadCheckpointError(f"{entry.name} is missing") from error
    except OSError as error:
        raise ForeignCheckpointError(f"{entry.name} cannot be read: {error.strerror}") from error
    if found != entry.sha256:
        raise BadCheckpointError(f"{entry.name} has other contents than its SHA-256 says")
