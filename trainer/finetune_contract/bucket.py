"""A folder of an object store (e.g. s3://bucket/folder), accessed through fsspec. Torch-free.

Only this module opens object stores: it selects the Python package and translates all errors to BucketError, an OSError
with a one-line message. Used for checkpoints, data sets and base models.

Credentials come from the user: from the environment (a Secret named in `spec.secrets`, e.g. AWS_ACCESS_KEY_ID) or from
the workload identity of the pod's service account; the store's client finds them. The client's own variable selects
another server than the public one: AWS_ENDPOINT_URL for s3://.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs"}
"""Python package that each scheme needs in addition to fsspec."""
BLOCK_BYTES = 32 * 1024 * 1024
"""Size of the parts in which large objects are uploaded and downloaded."""
_STAMPS = ("size", "ETag", "etag", "LastModified", "last_modified", "mtime")
"""Fields of the clients' answers that change when an object's contents change; at least the time of the write."""
_NO_READ = "cannot be read"
_CHECKSUM_ERRORS = frozenset({"FlexibleChecksumError", "ChecksumError"})
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"config_kwargs": {"connect_timeout": 10, "read_timeout": 60}},
}

_AZURE_VARIABLES = frozenset(
    {
        *(f"AZURE_STORAGE_{name}" for name in ("ACCOUNT_NAME", "ACCOUNT_KEY", "CONNECTION_STRING", "SAS_TOKEN")),
        *(f"AZURE_{name}" for name in ("CLIENT_ID", "CLIENT_SECRET", "TENANT_ID")),
    }
)


class BucketError(OSError):
    """An object store cannot be used; the message contains the URL and the problem."""


class DamagedObjectError(BucketError):
    """An object's contents do not match the checksum that the store keeps for it."""


def is_bucket_url(location: str) -> bool:
    """Return whether a location of a manifest is a folder or an object of an object store."""
    return location.partition("://")[0] in PACKAGES and "://" in location


class Bucket:
    """A folder of an object store; names are relative to it, with '/' between their parts.

    Listings are not cached, because other machines write to the folder, too.

    Args:
        url: the folder.
        credentials: variables of a Secret that belongs to this folder; they replace those of the environment. Empty:
            the client finds its credentials itself.
        adds_checksums: whether an S3 client adds a CRC-32 to each write, which the store keeps. Without it, the
            signature protects the contents, or the checksum that a request contains already.

    Raises:
        BucketError: the scheme is unknown, its package is missing, or the URL names no bucket.
    """

    def __init__(self, url: str, credentials: Mapping[str, str] | None = None, *, adds_checksums: bool = True) -> None:
        scheme, _, rest = url.partition("://")
        self.url = url.rstrip("/")
        if scheme not in PACKAGES or not rest.strip("/"):
            known = ", ".join(f"{name}://" for name in PACKAGES)
            raise BucketError(f"{url}: not a folder of an object store; write {known} followed by the bucket's name")
        self._fs = _filesystem(scheme, url, credentials or {}, adds_checksums=adds_checksums)
        self._root = rest.strip("/")

    @property
    def client(self) -> Any:
        """The fsspec client of the store."""
        return self._fs

    @property
    def root(self) -> str:
        """The bucket's name and the folder in it, without the scheme."""
        return self._root

    def below(self, name: str) -> Bucket:
        """Return a folder in this one."""
        other = object.__new__(Bucket)
        other.url, other._fs, other._root = f"{self.url}/{name}", self._fs, f"{self._root}/{name}"
        return other

    def names(self) -> list[str]:
        """Return the names of all objects in this folder and its subfolders, sorted."""
        with self._translating_errors("cannot be listed"):
            found = self._fs.find(self._root)
        return sorted(path.removeprefix(f"{self._root}/") for path in found)

    def stamps(self, only: str | None = None) -> dict[str, str]:
        """Return the names of all objects in this folder and its subfolders, each with a stamp of its contents.

        Args:
            only: restrict the result to this object.
        """
        with self._translating_errors("cannot be listed"):
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
        """Return whether an object exists."""
        with self._translating_errors(_NO_READ):
            return bool(self._fs.isfile(self._path(name)))

    def size_bytes(self, name: str) -> int:
        """Return the size of an object.

        Raises:
            FileNotFoundError: it does not exist.
        """
        with self._translating_errors(_NO_READ):
            return int(self._fs.info(self._path(name))["size"])

    def read(self, name: str) -> bytes:
        """Return the contents of a small object.

        Raises:
            FileNotFoundError: it does not exist.
        """
        with self._translating_errors(_NO_READ):
            return bytes(self._fs.cat_file(self._path(name)))

    def open(self, name: str, block_bytes: int = BLOCK_BYTES) -> contextlib.AbstractContextManager[BinaryIO]:
        """Open an object for reading in parts; smaller parts suit readers that seek."""
        return self._open(name, "rb", _NO_READ, block_bytes)

    def create(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """Open a large object for writing in parts; it becomes visible, complete, when the block ends without error."""
        return self._open(name, "wb", "cannot be written")

    def put(self, name: str, data: bytes) -> None:
        """Write a small object; an object of this name is replaced."""
        with self._translating_errors("cannot be written"):
            self._fs.pipe_file(self._path(name), data)

    def put_new(self, name: str, data: bytes) -> bool:
        """Write a small object unless one of this name exists.

        Returns:
            Whether it was written. Of two concurrent writers one wins if the store supports conditional writes (S3's
            If-None-Match). Otherwise only the check before the write protects the object, and both may win within the
            time of one request.
        """
        if self.exists(name):
            return False
        with self._translating_errors("cannot be written"):
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
        """Remove objects; missing objects are no error."""
        with self._translating_errors("cannot be removed"), contextlib.suppress(FileNotFoundError):
            if names:
                self._fs.rm([self._path(name) for name in names])

    def upload(self, name: str, path: Path) -> None:
        """Upload a local file as an object; an object of this name is replaced."""
        with self._translating_errors("cannot be written"):
            self._fs.put_file(str(path), self._path(name))

    def download(self, name: str, path: Path) -> None:
        """Download an object into a local file; create its folder if it is missing.

        Raises:
            FileNotFoundError: the object does not exist.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._translating_errors(_NO_READ):
            self._fs.get_file(self._path(name), str(path))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _open(self, name: str, mode: str, what: str, block_bytes: int = BLOCK_BYTES) -> Iterator[BinaryIO]:
        with (
            self._translating_errors(what),
            self._fs.open(self._path(name), mode, block_size=block_bytes, cache_type="readahead") as file,
        ):
            yield file

    def translating_errors(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Return a context that translates the errors of requests through `client` to BucketError."""
        return self._translating_errors(what)

    @contextlib.contextmanager
    def _translating_errors(self, what: str) -> Iterator[None]:
        """Translate the errors of all clients to BucketError; few of them are OSErrors."""
        try:
            yield
        except (FileExistsError, BucketError):
            raise
        except Exception as error:
            if isinstance(error, FileNotFoundError) and what == _NO_READ:
                # The object is missing; on a write this error means a missing bucket.
                raise
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            kind = DamagedObjectError if type(error).__name__ in _CHECKSUM_ERRORS else BucketError
            raise kind(f"{self.url} {what}: {reason}") from error


def _is_refused_condition(error: OSError) -> bool:
    """Return whether a store does not support conditional writes (S3's NotImplemented)."""
    return "NotImplemented" in str(error) or "not implemented" in str(error)


def client_options(scheme: str, credentials: Mapping[str, str]) -> dict[str, Any]:
    """Return the options of the client of a scheme for the variables of a Secret. Pure.

    Args:
        scheme: s3, gs or az.
        credentials: the variables by which the store's own tools are configured; others are ignored. For gs, the value
            of any key that is the JSON text of a service account.
    """
    if scheme == "s3":
        names = {"key": "AWS_ACCESS_KEY_ID", "secret": "AWS_SECRET_ACCESS_KEY", "token": "AWS_SESSION_TOKEN"}
        endpoint = credentials.get("AWS_ENDPOINT_URL_S3") or credentials.get("AWS_ENDPOINT_URL")
        region = credentials.get("AWS_REGION") or credentials.get("AWS_DEFAULT_REGION")
        return {
            **{option: credentials[name] for option, name in names.items() if credentials.get(name)},
            **({"endpoint_url": endpoint} if endpoint else {}),
            **({"client_kwargs": {"region_name": region}} if region else {}),
        }
    if scheme == "gs":
        account = next((text for text in credentials.values() if text.lstrip().startswith("{")), None)
        endpoint = credentials.get("STORAGE_EMULATOR_HOST")
        return {
            **({"token": json.loads(account)} if account else {}),
            **({"endpoint_url": endpoint, "token": "anon"} if endpoint and not account else {}),
        }
    return {
        name.removeprefix("AZURE_STORAGE_").removeprefix("AZURE_").lower(): value
        for name, value in credentials.items()
        if name in _AZURE_VARIABLES
    }


def _has_default_checksums() -> bool:
    """Return whether the installed S3 client adds checksums by itself: releases from 2025 on do."""
    return "request_checksum_calculation" in importlib.import_module("botocore.config").Config.OPTION_DEFAULTS


def _filesystem(scheme: str, url: str, credentials: Mapping[str, str], *, adds_checksums: bool) -> Any:
    """Return the client of a scheme.

    Raises:
        BucketError: its package is missing, or the client cannot be created.
    """
    package = PACKAGES[scheme]
    try:
        importlib.import_module(package)
        fsspec = importlib.import_module("fsspec")
    except ImportError as error:
        raise BucketError(
            f"{url}: {scheme}:// needs the Python package {package}, which is not installed; install {package}, or use "
            "an image that contains it"
        ) from error
    try:
        options = {**_OPTIONS.get(scheme, {}), **client_options(scheme, credentials)}
        if scheme == "s3" and not adds_checksums and _has_default_checksums():
            config = options.get("config_kwargs", {})
            options["config_kwargs"] = {**config, "request_checksum_calculation": "when_required"}
        return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True, **options)
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise BucketError(f"{url} cannot be opened: {reason}") from error
