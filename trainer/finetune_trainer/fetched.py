"""Downloads data sets and base models from an object store into the cache, where other modules read them as files.

An object that the cache holds, and that has not changed in the store since, is not downloaded again, so a later attempt
or another job starts at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from finetune_contract.bucket import Bucket, BucketError, is_bucket_url
from finetune_contract.image_folder import IMAGE_SUFFIXES, LIST_SUFFIXES
from finetune_trainer import patience
from finetune_trainer.errors import ConfigError, RankError, StorageError
from finetune_trainer.files import write_atomically

_SINGLE = (".safetensors", ".ckpt", ".parquet", ".tar", *IMAGE_SUFFIXES)
"""Suffixes of objects that are a complete base model, data set or image."""
_NUM_PARALLEL = 8
"""Number of parallel downloads."""


def fetch(location: str, field: str, cache_dir: Path, print_line: Callable[[str], None]) -> str:
    """Return the local path of a location in the manifest, after downloading it if it is in an object store.

    Args:
        location: path, hub id or URL.
        field: its field in the manifest, for messages.
        cache_dir: folder that all jobs share.
        print_line: receives the progress.

    Raises:
        ConfigError: the location does not exist.
        NetworkError: the object store does not answer.
        StorageError: the object store cannot be read, or the cache cannot be written.
    """
    if not is_bucket_url(location):
        return location
    if location.endswith(LIST_SUFFIXES):
        # The files that it lists are next to it.
        parent, _, name = location.rpartition("/")
        folder = Path(fetch(parent, field, cache_dir, print_line))
        if not (folder / name).is_file():
            raise _missing(location, field)
        return str(folder / name)
    folder = cache_dir / "objects" / hashlib.sha256(location.encode()).hexdigest()[:32]
    try:
        fetched = patience.wait_out(
            f"{field}: fetching {location}", lambda: _fetch_all(location, field, folder, print_line)
        )
        return str(fetched)
    except BucketError as error:
        raise StorageError(f"{field}: {error}") from error
    except OSError as error:
        raise StorageError(f"cache: cannot write {folder}: {error.strerror}") from error


def _fetch_all(location: str, field: str, folder: Path, print_line: Callable[[str], None]) -> Path:
    is_single = location.lower().endswith(_SINGLE)
    parent, _, last = location.rstrip("/").rpartition("/")
    bucket = Bucket(parent if is_single else location)
    stamps = bucket.stamps(last if is_single else None)
    if not stamps:
        raise _missing(location, field)
    note = folder.with_suffix(".json")
    known, done = _read_note(note), 0

    def fetch_one(name: str) -> None:
        _fetch_one(bucket, name, folder, field, is_same=known is None or known.get(name) == stamps[name])

    with ThreadPoolExecutor(_NUM_PARALLEL, thread_name_prefix="fetch") as pool:
        for _ in pool.map(fetch_one, stamps):
            done += 1
            print_line(f"{done}/{len(stamps)} objects fetched")
    for name in (known or {}).keys() - stamps.keys():
        (folder / name).unlink(missing_ok=True)
    if known != stamps:
        write_atomically(note, json.dumps(stamps).encode())
    return folder / last if is_single else folder


def _read_note(note: Path) -> dict[str, str] | None:
    """Return the stamps of the objects when they were fetched; None in a cache of an older release."""
    try:
        return {str(name): str(stamp) for name, stamp in json.loads(note.read_bytes()).items()}
    except (OSError, ValueError, AttributeError):
        return None


def _fetch_one(bucket: Bucket, name: str, folder: Path, field: str, is_same: bool) -> None:
    """Download an object unless the cache has it.

    Args:
        bucket: the folder in the object store.
        name: the object.
        folder: the folder in the cache.
        field: the field of the manifest, for messages.
        is_same: whether the object is unchanged since it was fetched, as far as this is known.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"{field}: the object {name!r} of {bucket.url} has a path outside its folder; rename the object"
        )
    try:
        # Objects of the same size can have other contents: all bases of a family have one size.
        if is_same and path.is_file() and path.stat().st_size == bucket.size_bytes(name):
            return
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.writing")
        try:
            bucket.download(name, temporary)
            temporary.replace(path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
    except FileNotFoundError as error:
        raise _missing(f"{bucket.url}/{name}", field) from error


def _missing(location: str, field: str) -> RankError:
    return ConfigError(f"{field}: nothing exists at {location}; write the URL of an existing folder or file")
