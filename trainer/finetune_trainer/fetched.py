"""Data sets and bases that lie in an object store: brought into the cache, where everything else finds files.

An object that is there with its size is not fetched again, so a later attempt, and another job, begin at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from finetune_contract.bucket import Bucket, BucketError, is_bucket_url
from finetune_trainer.errors import ConfigError, RankError, StorageError

_SINGLE = (".safetensors", ".ckpt", ".parquet", ".tar")
"""Ends of the names of objects that are a whole base or data set by themselves."""
_AT_ONCE = 8


def fetch(location: str, field: str, cache_dir: Path, say: Callable[[str], None]) -> str:
    """The local path of a location of the manifest: itself, or what is brought from an object store.

    Args:
        location: path, hub id or URL.
        field: where it stands in the manifest, for sentences.
        cache_dir: folder that all jobs share.
        say: told how far it is.

    Raises:
        ConfigError: nothing is there.
        StorageError: the store cannot be read now, or the cache cannot be written.
    """
    if not is_bucket_url(location):
        return location
    folder = cache_dir / "objects" / hashlib.sha256(location.encode()).hexdigest()[:32]
    try:
        return str(_fetch_all(location, field, folder, say))
    except BucketError as error:
        raise StorageError(f"{field}: {error}") from error
    except OSError as error:
        raise StorageError(f"cache: cannot write {folder}: {error.strerror}") from error


def _fetch_all(location: str, field: str, folder: Path, say: Callable[[str], None]) -> Path:
    is_single = location.endswith(_SINGLE)
    parent, _, last = location.rstrip("/").rpartition("/")
    bucket = Bucket(parent if is_single else location)
    names = [last] if is_single else bucket.names()
    if not names or (is_single and not bucket.exists(last)):
        raise _nothing(location, field)
    done = 0
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="fetch") as pool:
        for _ in pool.map(lambda name: _fetch_one(bucket, name, folder, field), names):
            done += 1
            say(f"{done}/{len(names)} objects fetched")
    return folder / last if is_single else folder


def _fetch_one(bucket: Bucket, name: str, folder: Path, field: str) -> None:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"{field}: the object {name!r} of {bucket.url} would lie outside of its folder; rename it")
    try:
        if path.is_file() and path.stat().st_size == bucket.size_bytes(name):
            return
        aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.writing")
        try:
            bucket.download(name, aside)
            aside.replace(path)
        finally:
            with contextlib.suppress(OSError):
                aside.unlink()
    except FileNotFoundError as error:
        raise _nothing(f"{bucket.url}/{name}", field) from error


def _nothing(location: str, field: str) -> RankError:
    return ConfigError(f"{field}: there is nothing at {location}; write the URL of a folder, or of one file, that is")
