"""What an object store must offer so that a large file can be uploaded in parts and resumed. Used by `bucket_target`.

A part is known by its number and the MD5 of its contents, so an upload that another process began can be continued
whenever its parts have the contents of this file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

MIN_PART_BYTES = 32 * 1024 * 1024
"""Size of the parts of files that fit into the store's number of parts."""
SHA256 = "sha256"
"""Name of the metadata of an object that contains the SHA-256 of its contents."""


@dataclass(frozen=True)
class UploadPart:
    """A part of a file: bytes [start, start + size) of it, with its number from 1."""

    number: int
    start: int
    size_bytes: int


@dataclass(frozen=True)
class PendingUpload:
    """An object that is being uploaded: its name below the target, the store's id, and the parts that exist there.

    Attributes:
        name: name of the object.
        handle: the store's id of the upload.
        parts: tag of each part by its number: its MD5 in hexadecimal, except in buckets with an own key of encryption.
    """

    name: str
    handle: str
    parts: Mapping[int, str]


class PartStore(Protocol):
    """One folder of an object store. All methods may be called by several threads.

    Raises:
        BucketError: the store refuses a request, or does not answer.
    """

    max_parts: int
    """Largest number of parts of an object."""

    def probe(self) -> None:
        """Write something that no reader can see, and remove it."""
        ...

    def sha256_of(self, name: str) -> tuple[int, str] | None:
        """Return the size and the SHA-256 that an object was uploaded with; None if there is no such object."""
        ...

    def find(self, name: str, sha256: str) -> list[PendingUpload]:
        """Return the unfinished uploads of an object, the newest first."""
        ...

    def begin(self, name: str, sha256: str) -> PendingUpload:
        """Begin an upload. The object, when it exists, keeps the SHA-256 as metadata."""
        ...

    def put(self, upload: PendingUpload, part: UploadPart, data: bytes) -> str:
        """Store one part, and return its tag for `commit`. The contents are checked: damaged ones are not stored."""
        ...

    def commit(self, upload: PendingUpload, parts: Mapping[int, str]) -> None:
        """Make the object of its parts, at once: readers see the earlier object or the complete new one."""
        ...

    def abort(self, upload: PendingUpload) -> None:
        """Remove an unfinished upload and its parts."""
        ...


def split(size_bytes: int, max_parts: int, min_part_bytes: int = MIN_PART_BYTES) -> list[UploadPart]:
    """Return the parts of a file of this size; an empty file has one empty part."""
    size = max(min_part_bytes, -(-size_bytes // max_parts))
    starts = range(0, max(size_bytes, 1), size)
    return [UploadPart(number, start, min(size, size_bytes - start)) for number, start in enumerate(starts, start=1)]


def read_part(path: Path, part: UploadPart) -> bytes:
    """Return the bytes of a part of a file."""
    with path.open("rb") as file:
        file.seek(part.start)
        return file.read(part.size_bytes)


def iterate_md5(path: Path, parts: list[UploadPart]) -> Iterator[tuple[int, str]]:
    """Yield the number and the MD5, in hexadecimal, of each of some parts of a file."""
    for part in parts:
        yield part.number, hashlib.md5(read_part(path, part), usedforsecurity=False).hexdigest()
