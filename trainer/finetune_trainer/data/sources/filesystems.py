"""Folders that samples are streamed from: of this machine, or of an object store."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from finetune_contract.bucket import Bucket, BucketError, is_bucket_url
from finetune_trainer.errors import DataError, StorageError

_BLOCK_BYTES = 1024 * 1024
"""Of a table that lies in a bucket: its parts are found by jumping."""


class Place(Protocol):
    """A folder; names are relative to it, with '/' between their parts."""

    url: str

    def names(self) -> list[str]:
        """Names of all files in it and the folders in it, sorted."""
        ...

    def files_in(self, below: str) -> list[str]:
        """Names of the files that lie right in a folder of it, empty for itself; without that folder's, sorted."""
        ...

    def folders_with(self, name: str) -> list[str]:
        """Names of the folders right in it that hold a file of this name, sorted."""
        ...

    def stamp(self, name: str) -> str | None:
        """What changes when a file does; None where there is none."""
        ...

    def read(self, name: str) -> bytes:
        """All of a file.

        Raises:
            DataError: there is none.
            StorageError: it cannot be read now.
        """
        ...

    def open(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """A file, to jump in; fails as `read` does."""
        ...


class Folder:
    """A folder of this machine."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.url = str(path)

    def names(self) -> list[str]:
        """Names of all files in it and the folders in it, sorted."""
        return sorted(path.relative_to(self._path).as_posix() for path in self._path.rglob("*") if path.is_file())

    def files_in(self, below: str) -> list[str]:
        """Names of the files that lie right in a folder of it; none where that is no folder."""
        folder = self._path / below
        return sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []

    def folders_with(self, name: str) -> list[str]:
        """Names of the folders right in it that hold a file of this name, sorted."""
        return sorted(path.parent.name for path in self._path.glob(f"*/{name}"))

    def stamp(self, name: str) -> str | None:
        """Size and time of change of a file; None where there is none."""
        try:
            stat = (self._path / name).stat()
        except OSError:
            return None
        return f"{stat.st_size} {stat.st_mtime_ns}"

    def read(self, name: str) -> bytes:
        """All of a file.

        Raises:
            DataError: it cannot be read.
        """
        with self.open(name) as file:
            return file.read()

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """A file.

        Raises:
            DataError: it cannot be read.
        """
        try:
            with (self._path / name).open("rb") as file:
                yield file
        except OSError as error:
            raise DataError(f"dataset.source: {self._path / name} cannot be read: {error.strerror}") from error


class BucketFolder:
    """A folder of an object store, listed once."""

    def __init__(self, bucket: Bucket, only: str | None = None) -> None:
        self._bucket = bucket
        self.url = bucket.url
        self._stamps = bucket.stamps(only)

    def names(self) -> list[str]:
        """Names of all objects in it and the folders in it, sorted."""
        return sorted(self._stamps)

    def files_in(self, below: str) -> list[str]:
        """Names of the objects that lie right in a folder of it; none where there is no such folder."""
        start = f"{below}/" if below else ""
        names = (name.removeprefix(start) for name in self._stamps if name.startswith(start))
        return sorted(name for name in names if "/" not in name)

    def folders_with(self, name: str) -> list[str]:
        """Names of the folders right in it that hold an object of this name, sorted."""
        parts = (each.split("/") for each in self._stamps)
        return sorted(part[0] for part in parts if part[1:] == [name])

    def stamp(self, name: str) -> str | None:
        """What the store tells of an object's contents; None where there is none."""
        return self._stamps.get(name)

    def read(self, name: str) -> bytes:
        """All of an object.

        Raises:
            DataError: there is none.
            StorageError: the store cannot be read now.
        """
        with _telling(f"{self.url}/{name}"):
            return self._bucket.read(name)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """An object.

        Raises:
            DataError: there is none.
            StorageError: the store cannot be read now.
        """
        with _telling(f"{self.url}/{name}"), self._bucket.open(name, _BLOCK_BYTES) as file:
            yield file


def open_place(url: str, only: str | None = None) -> Place:
    """A folder by its path or URL; of one in a bucket only a single object, where that is named.

    Raises:
        DataError: nothing is there.
        StorageError: the store cannot be read now.
    """
    if not is_bucket_url(url):
        return Folder(Path(url))
    with _telling(url):
        place = BucketFolder(Bucket(url), only)
    if not place.names():
        whole = f"{url}/{only}" if only else url
        raise DataError(
            f"dataset.source: there is nothing at {whole}; write the URL of a folder, or of one file, that is"
        )
    return place


@contextlib.contextmanager
def _telling(what: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"dataset.source: there is no {what}") from error
    except BucketError as error:
        raise StorageError(f"dataset.source: {error}") from error
