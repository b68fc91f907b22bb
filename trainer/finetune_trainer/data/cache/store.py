"""A content-addressed store of named tensors: the outputs of frozen encoders for images and captions.

It is a folder of safetensors shards. Each shard is written to a temporary file and then renamed, so every shard is
complete. All ranks, and all jobs with the same encoder, share the folder. The key of an item is the hash of everything
that its tensors depend on, so no item becomes stale, and an interrupted map phase continues with the missing items.

An index file lists the items of all shards, so that a later attempt opens only the shards that it reads.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from finetune_trainer import patience
from finetune_trainer.data.cache.store_index import INDEX_NAME, ShardItems, pack_index, unpack_index
from finetune_trainer.data.hashes import hash_text
from finetune_trainer.errors import StorageError
from finetune_trainer.files import sync_file, sync_folder, use_default_mode, write_atomically

_LOG = logging.getLogger(__name__)
_SUFFIX = ".safetensors"
_LEFTOVER_SECONDS = 3600.0
MAX_OPEN = 64
"""Largest number of open shards: each one keeps the names of all its tensors in memory."""

Item = Mapping[str, Tensor]


class TensorCache:
    """The items of one encoder. Reading maps the files into memory, so only the pages in use take memory.

    The index has 16 bytes and the number of the shard per item, so a hundred thousand items take a few megabytes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shards: list[Path] = []
        self._parts: list[tuple[str, ...]] = []
        """Names of the tensors of the items in each shard."""
        self._shard_of: dict[bytes, int] = {}
        self._sizes: list[int] = []
        """Sizes of the shards in bytes."""
        self._indexed: set[Path] = set()
        self._num_saved = 0
        """Number of shards in the index file."""
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._reading = threading.Lock()

    def sweep(self, now: float) -> None:
        """Remove the partial files of killed ranks. Newer partial files may belong to a running rank and stay.

        Args:
            now: seconds since the epoch.
        """
        for partial in self._folder.glob(".*.writing"):
            with contextlib.suppress(OSError):
                if now - partial.stat().st_mtime > _LEFTOVER_SECONDS:
                    partial.unlink()

    def refresh(self) -> None:
        """Index the shards that were added since the last call."""
        sizes = self._list_shards()
        if not self._indexed:
            self._read_index(sizes)
        for shard in sorted(sizes):
            if shard not in self._indexed:
                self._index(shard, sizes[shard])

    def save_index(self) -> None:
        """Write the index file if there are more shards than in it. A full or failing disk is waited out.

        Raises:
            StorageError: it cannot be written.
        """
        if len(self._shards) > self._num_saved:
            patience.wait_out("cache: writing", self._save_index)
            self._num_saved = len(self._shards)

    def _save_index(self) -> None:
        path = self._folder / INDEX_NAME
        try:
            write_atomically(path, pack_index(self._listing()))
        except OSError as error:
            raise StorageError(f"cache: cannot write {path}: {error}") from error

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Return the keys that no shard holds, without duplicates, sorted."""
        return sorted({key for key in keys if _digest(key) not in self._shard_of})

    def __contains__(self, key: str) -> bool:
        return _digest(key) in self._shard_of

    def shard(self, key: str) -> int:
        """Return the number of the shard that holds an item. Reading the items of one shard in a row is fastest.

        Raises:
            KeyError: no shard holds it.
        """
        return self._shard_of[_digest(key)]

    def get(self, key: str) -> dict[str, Tensor]:
        """Return the tensors of an item.

        Raises:
            KeyError: no shard holds it.
            StorageError: its shard is damaged; it is removed, so that the next attempt computes its items again.
        """
        shard = self.shard(key)
        with self._reading:
            try:
                if shard not in self._open:
                    self._open[shard] = safe_open(self._shards[shard], framework="pt")
                self._open.move_to_end(shard)
                if len(self._open) > MAX_OPEN:
                    self._open.popitem(last=False)
                return {part: self._open[shard].get_tensor(f"{key}.{part}") for part in self._parts[shard]}
            except SafetensorError as error:
                raise self._damaged(self._shards[shard], error) from error

    def _damaged(self, shard: Path, error: Exception) -> StorageError:
        """Remove a shard that the index file trusts but that cannot be read, and return the error."""
        for path in (self._folder / INDEX_NAME, shard):
            with contextlib.suppress(OSError):
                path.unlink()
        return StorageError(f"cache: {shard} is damaged ({error}); the next attempt computes its items again")

    def _list_shards(self) -> dict[Path, int]:
        """Return the sizes of the shards in the folder."""
        try:
            with os.scandir(self._folder) as entries:
                return {Path(each.path): each.stat().st_size for each in entries if _is_shard(each.name)}
        except FileNotFoundError:
            return {}

    def _read_index(self, sizes: Mapping[Path, int]) -> None:
        """Take the items of the shards from the index file, except for shards that have another size."""
        try:
            listing = unpack_index((self._folder / INDEX_NAME).read_bytes())
        except OSError:
            return
        for each in listing:
            if sizes.get(shard := self._folder / each.name) == each.size:
                self._add(shard, each.size, each.parts, each.digests)
        self._num_saved = len(self._shards)

    def _listing(self) -> list[ShardItems]:
        digests: list[list[bytes]] = [[] for _ in self._shards]
        for digest, number in self._shard_of.items():
            digests[number].append(digest)
        rows = zip(self._shards, self._sizes, self._parts, digests, strict=True)
        return [ShardItems(shard.name, size, parts, found) for shard, size, parts, found in rows]

    def _add(self, shard: Path, size: int, parts: tuple[str, ...], digests: Iterable[bytes]) -> None:
        self._indexed.add(shard)
        number = len(self._shards)
        self._shards.append(shard)
        self._sizes.append(size)
        self._parts.append(parts)
        for digest in digests:
            self._shard_of.setdefault(digest, number)

    def put(self, items: Mapping[str, Item]) -> None:
        """Write items as one shard.

        A full or failing disk is waited out.

        Raises:
            StorageError: it cannot be written.
        """
        patience.wait_out("cache: writing", lambda: self._put(items))

    def _put(self, items: Mapping[str, Item]) -> None:
        shard = self._folder / f"{hash_text(*sorted(items))[:32]}{_SUFFIX}"
        partial = self._folder / f".{shard.name}.{secrets.token_hex(4)}.writing"
        tensors = {
            f"{key}.{part}": tensor.contiguous().cpu() for key, item in items.items() for part, tensor in item.items()
        }
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial)
            use_default_mode([partial], self._folder)
            sync_file(partial)
            partial.replace(shard)
            sync_folder(self._folder)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise StorageError(f"cache: cannot write {shard}: {error}") from error

    def _index(self, shard: Path, size: int) -> None:
        try:
            with safe_open(shard, framework="pt") as file:
                names = sorted(file.keys())
        except (OSError, SafetensorError) as error:
            _LOG.warning("cache: %s is damaged; its items will be computed again: %s", shard, error)
            return
        parts = tuple(sorted({name.partition(".")[2] for name in names}))
        keys = dict.fromkeys(name.partition(".")[0] for name in names)
        self._add(shard, size, parts, map(_digest, keys))


def _is_shard(name: str) -> bool:
    # Partial files are hidden.
    return name.endswith(_SUFFIX) and not name.startswith(".")


def _digest(key: str) -> bytes:
    """Return the form of a key that the index stores."""
    return hashlib.blake2b(key.encode(), digest_size=16).digest()
