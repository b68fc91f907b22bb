"""The manifest that makes a checkpoint count, and the check of a checkpoint against it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finetune_contract import paths

FORMAT_VERSION = 1


class FileEntry(BaseModel):
    """One file of a checkpoint."""

    model_config = ConfigDict(frozen=True)

    name: str
    size_bytes: int = Field(ge=0)
    sha256: str


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


class BadCheckpointError(Exception):
    """A folder is no whole checkpoint of this job; the text names the file and what is wrong with it."""


def describe_files(folder: Path, names: Iterable[str]) -> tuple[FileEntry, ...]:
    """Sizes and hashes of files, sorted by name.

    Raises:
        OSError: one cannot be read.
    """
    return tuple(
        FileEntry(name=name, size_bytes=(folder / name).stat().st_size, sha256=_sha256(folder / name))
        for name in sorted(names)
    )


def verify(folder: Path, job_uid: str) -> Manifest:
    """Check every file of a checkpoint against its manifest.

    Raises:
        BadCheckpointError: it is not whole, not this job's, or of a newer format.
    """
    manifest = read_manifest(folder)
    if manifest.format_version > FORMAT_VERSION:
        raise BadCheckpointError(
            f"{paths.MANIFEST} has format {manifest.format_version}, and this trainer reads up to {FORMAT_VERSION}"
        )
    if manifest.job_uid != job_uid:
        raise BadCheckpointError(f"{paths.MANIFEST} belongs to another job ({manifest.job_uid})")
    for entry in manifest.files:
        _verify_file(folder, entry)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest.

    Raises:
        BadCheckpointError: there is none that can be read.
    """
    try:
        return Manifest.model_validate_json((folder / paths.MANIFEST).read_bytes())
    except FileNotFoundError as error:
        raise BadCheckpointError(f"{paths.MANIFEST} is missing") from error
    except OSError as error:
        raise BadCheckpointError(f"{paths.MANIFEST} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise BadCheckpointError(f"{paths.MANIFEST} is damaged") from error


def _verify_file(folder: Path, entry: FileEntry) -> None:
    path = folder / entry.name
    try:
        size = path.stat().st_size
        if size != entry.size_bytes:
            raise BadCheckpointError(f"{entry.name} has {size} bytes in place of {entry.size_bytes}")
        if _sha256(path) != entry.sha256:
            raise BadCheckpointError(f"{entry.name} has other contents than its SHA-256 says")
    except FileNotFoundError as error:
        raise BadCheckpointError(f"{entry.name} is missing") from error
    except OSError as error:
        raise BadCheckpointError(f"{entry.name} cannot be read: {error.strerror}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
