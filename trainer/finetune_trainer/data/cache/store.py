"""A content-addressed store of named tensors: what frozen encoders made of images and captions.

A folder of safetensors shards, each written aside and renamed, so that whatever is there is whole; shared by all ranks
and all jobs with the same encoder. An item's key is the hash of all that its tensors depend on, so nothing in it ever
becomes stale, and an interrupted map phase goes on with what is missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from finetune_trainer.data.cache.hashes import hash_text
from finetune_trainer.errors import StorageError
from finetune_trainer.files import sync_file, sync_folder

_LOG = logging.getLogger(__name__)
_SUFFIX = ".safetensors"
_LEFTOVER_SECONDS = 3600.0
MAX_OPEN = 64
"""Shards that are open at a time: each holds the names of all of its tensors in memory."""

Item = Mapping[str, Tensor]


class TensorCache:
    """The items of one encoder. Reading maps the files into memory; nothing is held beyond the pages in use.

    For each item it remembers 16 bytes and the number of its shard, so a hundred thousand take a few megabytes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shards: list[Path] = []
        self._parts: list[tuple[str, ...]] = []
        """Names of the tensors of the items in each shard."""
        self._shard_of: dict[bytes, int] = {}
        self._indexed: set[Path] = set()
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._reading = threading.Lock()

    def sweep(self, now: float) -> None:
        """Remove what killed ranks have left half written; what is younger may still be at work.

        Args:
            now: seconds since the epoch.
        """
        for aside in self._folder.glob(".*.writing"):
            with contextlib.suppress(OSError):
                if now - aside.stat().st_mtime > _LEFTOVER_SECONDS:
                    aside.unlink()

    def refresh(self) -> None:
        """Look for shards that were added since."""
        for shard in sorted(self._folder.glob(f"*{_SUFFIX}")):
            if shard not in self._indexed:
                self._index(shard)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of the keys that no shard holds, each once, sorted."""
        return sorted({key for key in keys if _digest(key) not in self._shard_of})

    def __contains__(self, key: str) -> bool:
        return _digest(key) in self._shard_of

    def shard(self, key: str) -> int:
        """Number of the shard that holds an item: those of one shard are read fastest one after the other.

        Raises:
            KeyError: it is not here.
        """
        return self._shard_of[_digest(key)]

    def get(self, key: str) -> dict[str, Tensor]:
        """The tensors of an item.

        Raises:
            KeyError: it is not here.
        """
        shard = self.shard(key)
        with self._reading:
            if shard not in self._open:
                self._open[shard] = safe_open(self._shards[shard], framework="pt")
            self._open.move_to_end(shard)
            if len(self._open) > MAX_OPEN:
                self._open.popitem(last=False)
            return {part: self._open[shard].get_tensor(f"{key}.{part}") for part in self._parts[shard]}

    def put(self, items: Mapping[str, Item]) -> None:
        """Write items as one shard.

        Raises:
            StorageError: it cannot be written.
        """
        shard = self._folder / f"{hash_text(*sorted(items))[:32]}{_SUFFIX}"
        aside = self._folder / f".{shard.name}.{secrets.token_hex(4)}.writing"
        tensors = {
            f"{key}.{part}": tensor.contiguous().cpu() for key, item in items.items() for part, tensor in item.items()
        }
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, aside)
            sync_file(aside)
            aside.replace(shard)
            sync_folder(self._folder)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                aside.unlink()
            raise StorageError(f"cache: cannot write {shard}: {error}") from error

    def _index(self, shard: Path) -> None:
        try:
            with safe_open(shard, framework="pt") as file:
                names = sorted(file.keys())
        except (OSError, SafetensorError) as error:
            _LOG.warning("cache: %s is damaged and is computed anew: %s", shard, error)
            return
        self._indexed.add(shard)
        number = len(self._shards)
        self._shards.append(shard)
        self._parts.append(tuple(sorted({name.partition(".")[2] for name in names})))
        for name in names:
            self._shard_of.setdefault(_digest(name.partition(".")[0]), number)


def _digest(key: str) -> bytes:
    """A key as it is remembered."""
    return hashlib.blake2b(key.encode(), digest_size=16).digest()
