"""Folders that hold a data set: on this machine, or in an object store."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from finetune_contract.bucket import Bucket, BucketError, is_bucket_url
from finetune_trainer.errors import DataError, StorageError

_BLOCK_BYTES = 1024 * 1024
"""Read size for an object: a table is read at random offsets, so larger blocks would transfer unneeded bytes."""


class Filesystem(Protocol):
    """A folder. Names are relative to it, with '/' between their parts."""

    url: str

    def list_files(self) -> list[str]:
        """List the names of all files in the folder and its subfolders, sorted."""
        ...

    def list_subfolders_with(self, name: str) -> list[str]:
        """List the names of the direct subfolders that hold a file of this name, sorted."""
        ...

    def stamp(self, name: str) -> str | None:
        """Return a text that changes when the file changes; None if there is no such file."""
        ...

    def read(self, name: str) -> bytes:
        """Read a complete file.

        Raises:
            DataError: it does not exist.
            StorageError: it cannot be read now.
        """
        ...

    def open(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """Open a file for reading at any offset. Raise the errors of `read`."""
        ...


class LocalFolder:
    """A folder of this machine."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.url = str(path)

    def list_files(self) -> list[str]:
        """List the names of all files in the folder and its subfolders, sorted; links to folders are followed."""
        found: list[str] = []
        visited: set[str] = set()
        for folder, subfolders, names in os.walk(self._path, followlinks=True):
            if (real := os.path.realpath(folder)) in visited:
                # A link to one of its own parents has no end.
                subfolders.clear()
                continue
            visited.add(real)
            below = Path(folder).relative_to(self._path)
            found += [(below / name).as_posix() for name in names if Path(folder, name).is_file()]
        return sorted(found)

    def list_subfolders_with(self, name: str) -> list[str]:
        """List the names of the direct subfolders that hold a file of this name, sorted."""
        return sorted(path.parent.name for path in self._path.glob(f"*/{name}"))

    def stamp(self, name: str) -> str | None:
        """Return the size and the modification time of a file; None if there is no such file."""
        try:
            stat = (self._path / name).stat()
        except OSError:
            return None
        return f"{stat.st_size} {stat.st_mtime_ns}"

    def read(self, name: str) -> bytes:
        """Read a complete file.

        Raises:
            DataError: it cannot be read.
        """
        with self.open(name) as file:
            return file.read()

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """Open a file.

        Raises:
            DataError: it cannot be read.
        """
        try:
            with (self._path / name).open("rb") as file:
                yield file
        except OSError as error:
            raise DataError(unreadable_file("file", self._path / name, error)) from error


class BucketFolder:
    """A folder of an object store. It is listed once.

    Args:
        bucket: the folder.
        only: list only the object of this name.

    Raises:
        FileNotFoundError: there is no such bucket.
        BucketError: the store cannot be read now.
    """

    def __init__(self, bucket: Bucket, only: str | None = None) -> None:
        self._bucket = bucket
        self.url = bucket.url
        self._stamps = bucket.stamps(only)

    def list_files(self) -> list[str]:
        """List the names of all objects in the folder and its subfolders, sorted."""
        return sorted(self._stamps)

    def list_subfolders_with(self, name: str) -> list[str]:
        """List the names of the direct subfolders that hold an object of this name, sorted."""
        parts = (each.split("/") for each in self._stamps)
        return sorted(part[0] for part in parts if part[1:] == [name])

    def stamp(self, name: str) -> str | None:
        """Return what the store reports of an object's contents (ETag, size, ...); None if there is no such object."""
        return self._stamps.get(name)

    def read(self, name: str) -> bytes:
        """Read a complete object.

        Raises:
            DataError: it does not exist.
            StorageError: the store cannot be read now.
        """
        with _bucket_errors(f"{self.url}/{name}"):
            return self._bucket.read(name)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """Open an object.

        Raises:
            DataError: it does not exist.
            StorageError: the store cannot be read now.
        """
        with _bucket_errors(f"{self.url}/{name}"), self._bucket.open(name, _BLOCK_BYTES) as file:
            yield file


def open_filesystem(url: str, only: str | None = None) -> Filesystem:
    """Open a folder.

    Args:
        url: its path or URL.
        only: name of the single object that is needed; a folder of a bucket then lists no others.

    Raises:
        DataError: there is no such folder in the object store.
        StorageError: the store cannot be read now.
    """
    if not is_bucket_url(url):
        return LocalFolder(Path(url))
    with _bucket_errors(url):
        folder = BucketFolder(Bucket(url), only)
    if not folder.list_files():
        missing = f"{url}/{only}" if only else url
        raise DataError(f"dataset.source: {missing} does not exist; write the URL of an existing folder or file")
    return folder


def unreadable_file(what: str, path: Path, error: OSError) -> str:
    """Return the message for a local file of the data set that cannot be read."""
    return f"dataset.source: {what} {path} cannot be read: {error.strerror}; restore it, or remove it from the data set"


@contextlib.contextmanager
def _bucket_errors(what: str) -> Iterator[None]:
    """Translate the errors of an object store that occur within this block."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(
            f"dataset.source: {what} does not exist; write the URL of an existing folder or file, or upload it"
        ) from error
    except BucketError as error:
        raise StorageError(f"dataset.source: {error}") from error
