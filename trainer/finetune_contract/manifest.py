"""The manifest, whose presence commits a checkpoint, and the verification of a checkpoint against it."""

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
    """Path relative to the checkpoint's folder, with '/' between its parts."""
    size_bytes: int = Field(ge=0)
    sha256: str

    @field_validator("name")
    @classmethod
    def _stays_below(cls, name: str) -> str:
        """Refuse names that lead out of the folder: files are downloaded under their names."""
        if name.startswith("/") or not {"", ".", ".."}.isdisjoint(name.split("/")):
            raise ValueError(f"{name!r} is not a relative path inside the folder")
        return name


class Manifest(BaseModel):
    """Contents of a complete checkpoint."""

    model_config = ConfigDict(frozen=True)

    format_version: int = FORMAT_VERSION
    job_uid: str
    attempt: int = Field(ge=1)
    step: int = Field(ge=0)
    time: float
    """Time of the write, in seconds since the epoch."""
    files: tuple[FileEntry, ...]
    sha256: str = ""
    """Hash of the manifest itself without this field; empty in format 1."""

    def sealed(self) -> Manifest:
        """Return the manifest with its own hash."""
        return self.model_copy(update={"sha256": self._digest()})

    @property
    def is_intact(self) -> bool:
        """Return whether the manifest is unchanged since it was sealed."""
        return self.format_version == 1 or self.sha256 == self._digest()

    def _digest(self) -> str:
        return hashlib.sha256(self.model_dump_json(exclude={"sha256"}).encode()).hexdigest()


class BadCheckpointError(Exception):
    """A folder is not a complete checkpoint of this job; the message names the file and the problem."""


class ForeignCheckpointError(BadCheckpointError):
    """A checkpoint cannot be verified: it belongs to another job, has a newer format, or is not readable now."""


def verify(folder: Path, job_uid: str) -> Manifest:
    """Check every file of a checkpoint against its manifest.

    Raises:
        ForeignCheckpointError: it belongs to another job, has a newer format, or is not readable now.
        BadCheckpointError: it is incomplete or damaged.
    """
    manifest = read_manifest(folder)
    check_manifest(manifest, job_uid)
    for entry in manifest.files:
        verify_size(folder, entry)
    with ThreadPoolExecutor(VERIFY_THREADS) as pool:
        list(pool.map(lambda entry: verify_file(folder, entry), manifest.files))
    return manifest


def check_manifest(manifest: Manifest, job_uid: str) -> None:
    """Check the format, the hash and the job of a manifest.

    Raises:
        ForeignCheckpointError: it belongs to another job, or has a newer format.
        BadCheckpointError: it is damaged.
    """
    if manifest.format_version > FORMAT_VERSION:
        raise ForeignCheckpointError(
            f"{paths.MANIFEST} has format {manifest.format_version}, but this trainer reads formats up to "
            f"{FORMAT_VERSION}"
        )
    if not manifest.is_intact:
        raise BadCheckpointError(f"{paths.MANIFEST} is damaged")
    if manifest.job_uid != job_uid:
        raise ForeignCheckpointError(f"{paths.MANIFEST} belongs to another job ({manifest.job_uid})")


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest.

    Raises:
        ForeignCheckpointError: it is not readable now.
        BadCheckpointError: it is missing or damaged.
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
    """Check that a file exists and has its size.

    Raises:
        ForeignCheckpointError: it is not readable.
        BadCheckpointError: it is missing, or has another size.
    """
    try:
        size = (folder / entry.name).stat().st_size
    except FileNotFoundError as error:
        raise BadCheckpointError(f"{entry.name} is missing") from error
    except OSError as error:
        raise ForeignCheckpointError(f"{entry.name} cannot be read: {error.strerror}") from error
    if size != entry.size_bytes:
        raise BadCheckpointError(f"{entry.name} has {size} bytes instead of {entry.size_bytes}")


def verify_file(folder: Path, entry: FileEntry, from_disk: bool = False) -> None:
    """Check a file against its size and hash.

    Args:
        folder: folder of the checkpoint.
        entry: expected name, size and hash.
        from_disk: drop the file from the page cache first, so that the disk is read.

    Raises:
        ForeignCheckpointError: it is not readable.
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
        raise BadCheckpointError(f"{entry.name} does not match its SHA-256")
