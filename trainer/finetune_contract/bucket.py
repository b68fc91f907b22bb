"""A folder of an object store (s3://bucket/folder and the like), through fsspec. Torch-free.

The one place that knows how a store is opened, which package it needs, whose credentials it takes, and what goes wrong:
every failure is a BucketError, which is an OSError with one sentence. Used for checkpoints, data sets and bases.

Credentials are the user's: those of the environment (a Secret named in `spec.secrets`, e.g. AWS_ACCESS_KEY_ID) or the
workload identity of the pod's service account, as the store's own client finds them. Another server than the public one
is named by the client's own variable, AWS_ENDPOINT_URL for s3://.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs"}
"""The Python package that each scheme needs besides fsspec."""
BLOCK_BYTES = 32 * 1024 * 1024
"""Large objects go up and come down in parts of this size."""
_STAMPS = ("size", "ETag", "etag", "LastModified", "last_modified", "mtime")
"""What the clients tell of an object's contents: by the time that it was written at the latest."""
_NO_READ = "cannot be read"
_CHECKSUM_ERRORS = frozenset({"FlexibleChecksumError", "ChecksumError"})
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"config_kwargs": {"connect_timeout": 10, "read_timeout": 60}},
}


class BucketError(OSError):
    """An object store could not be used; the text names the URL and what is wrong."""


class DamagedObjectError(BucketError):
    """An object has other contents than the checksum that the store keeps with it."""


def is_bucket_url(location: str) -> bool:
    """Whether a location of a manifest is a folder or an object of an object store."""
    return location.partition("://")[0] in PACKAGES and "://" in location


class Bucket:
    """A folder of an object store; names are relative to it, with '/' between their parts.

    Nothing of what was listed is remembered, for other machines write there, too.

    Raises:
        BucketError: no such scheme, its package is missing, or the URL names no bucket.
    """

    def __init__(self, url: str) -> None:
        scheme, _, rest = url.partition("://")
        self.url = url.rstrip("/")
        if scheme not in PACKAGES or not rest.strip("/"):
            known = ", ".join(f"{name}://" for name in PACKAGES)
            raise BucketError(f"{url}: no folder of an object store; write {known} with the bucket's name behind it")
        self._fs = _filesystem(scheme, url)
        self._root = rest.strip("/")

    def below(self, name: str) -> Bucket:
        """A folder in this one."""
        other = object.__new__(Bucket)
        other.url, other._fs, other._root = f"{self.url}/{name}", self._fs, f"{self._root}/{name}"
        return other

    def names(self) -> list[str]:
        """Names of all objects in this folder and the folders in it, sorted; none where nothing is."""
        with self._telling("cannot be listed"):
            found = self._fs.find(self._root)
        return sorted(path.removeprefix(f"{self._root}/") for path in found)

    def stamps(self, only: str | None = None) -> dict[str, str]:
        """Names of all objects in this folder and the folders in it, each with what changes when its contents do.

        Args:
            only: a single one, and no others.
        """
        with self._telling("cannot be listed"):
            if only is None:
                found = self._fs.find(self._root, detail=True)
            else:
                path = self._path(only)
                found = {path: self._fs.info(path)} if self._fs.isfile(path) else {}
        return {
            path.removeprefix(f"{self._root}/"): " ".join(str(about[key]) for key in _STAMPS if key in about)
            for path, about in sorted(found.items())
        }

    def exists(self, name: str) -> bool:
        """Whether there is such an object."""
        with self._telling(_NO_READ):
            return bool(self._fs.isfile(self._path(name)))

    def size_bytes(self, name: str) -> int:
        """Size of an object.

        Raises:
            FileNotFoundError: there is none.
        """
        with self._telling(_NO_READ):
            return int(self._fs.info(self._path(name))["size"])

    def read(self, name: str) -> bytes:
        """All of a small object.

        Raises:
            FileNotFoundError: there is none.
        """
        with self._telling(_NO_READ):
            return bytes(self._fs.cat_file(self._path(name)))

    def open(self, name: str, block_bytes: int = BLOCK_BYTES) -> contextlib.AbstractContextManager[BinaryIO]:
        """Read an object from its beginning to its end, part by part; smaller parts suit whoever jumps in it."""
        return self._open(name, "rb", _NO_READ, block_bytes)

    def create(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """Write a large object part by part; it is there, whole, when the block ends well, and not before."""
        return self._open(name, "wb", "cannot be written")

    def put(self, name: str, data: bytes) -> None:
        """Write a small object, in place of one of this name."""
        with self._telling("cannot be written"):
            self._fs.pipe_file(self._path(name), data)

    def put_new(self, name: str, data: bytes) -> bool:
        """Write a small object unless there is one of this name; False where there is.

        Two writers at once: one wins, where the store knows conditional writes (S3's If-None-Match). Where it refuses
        them, the object is looked for first: then both may believe that they have won, in the time of one request.
        """
        if self.exists(name):
            return False
        with self._telling("cannot be written"):
            try:
                self._fs.pipe_file(self._path(name), data, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                if not _is_refused_condition(error):
                    raise
                self._fs.pipe_file(self._path(name), data)
            except (NotImplementedError, TypeError):
                self._fs.pipe_file(self._path(name), data)
        return True

    def remove(self, names: list[str]) -> None:
        """Remove objects; one that is gone already is no error."""
        with self._telling("cannot be removed"), contextlib.suppress(FileNotFoundError):
            if names:
                self._fs.rm([self._path(name) for name in names])

    def upload(self, name: str, path: Path) -> None:
        """Write a file of this machine as an object, in place of one of this name."""
        with self._telling("cannot be written"):
            self._fs.put_file(str(path), self._path(name))

    def download(self, name: str, path: Path) -> None:
        """Write an object into a file of this machine, whose folder is made where it is missing.

        Raises:
            FileNotFoundError: there is no such object.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._telling(_NO_READ):
            self._fs.get_file(self._path(name), str(path))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _open(self, name: str, mode: str, what: str, block_bytes: int = BLOCK_BYTES) -> Iterator[BinaryIO]:
        with (
            self._telling(what),
            self._fs.open(self._path(name), mode, block_size=block_bytes, cache_type="readahead") as file,
        ):
            yield file

    @contextlib.contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        """Every client has errors of its own, and few of them are OSErrors."""
        try:
            yield
        except (FileExistsError, BucketError):
            raise
        except Exception as error:
            if isinstance(error, FileNotFoundError) and what == _NO_READ:
                # An object that is not there; where something is written it is the bucket.
                raise
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            kind = DamagedObjectError if type(error).__name__ in _CHECKSUM_ERRORS else BucketError
            raise kind(f"{self.url} {what}: {reason}") from error


def _is_refused_condition(error: OSError) -> bool:
    """Whether a store does not know conditional writes: S3's NotImplemented, or an invalid argument."""
    return "NotImplemented" in str(error) or "not implemented" in str(error)


def _filesystem(scheme: str, url: str) -> Any:
    """The client of a scheme.

    Raises:
        BucketError: its package is missing, or it cannot be made.
    """
    package = PACKAGES[scheme]
    try:
        importlib.import_module(package)
        fsspec = importlib.import_module("fsspec")
    except ImportError as error:
        raise BucketError(
            f"{url}: {scheme}:// needs the Python package {package}, which is not installed here; install {package}, "
            "or use an image that has it"
        ) from error
    try:
        return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True, **_OPTIONS.get(scheme, {}))
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise BucketError(f"{url} cannot be opened: {reason}") from error
