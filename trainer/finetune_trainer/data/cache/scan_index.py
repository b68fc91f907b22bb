"""The index of an image scan: what an attempt found in the files of a data set. A later attempt reads this one file.

It names the state of each file (size, mtime, ctime), which every change of the file changes. So a later attempt
compares the states instead of the contents. An attempt whose data set is pinned does this in the background, while it
loads the weights, and waits for the result before its first step.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from finetune_trainer import patience
from finetune_trainer.data.hashes import hash_text
from finetune_trainer.files import write_atomically

Sizes = np.ndarray[tuple[int, int], np.dtype[np.int32]]
FileStates = np.ndarray[tuple[int, int], np.dtype[np.int64]]
"""Size, mtime and ctime of files, int64 (n, 3); all -1 for a file that does not exist."""
NO_FILE = (-1, -1, -1)
_ID_BYTES = 32
_CHECKSUM_BYTES = 32
_NUM_READERS = 16
"""Threads that read the states: on network storage each takes a round trip."""


@dataclass(frozen=True)
class ScanIndex:
    """A scan, and the states that the files had before they were read; see `ImageScan`."""

    ids: tuple[str, ...]
    sizes: Sizes
    states: FileStates

    def to_bytes(self) -> bytes:
        """Return the content of the index's file, which starts with its checksum."""
        ids = b"".join(bytes.fromhex(each).rjust(_ID_BYTES, b"\0") for each in self.ids)
        content = ids + self.sizes.astype("<i4").tobytes() + self.states.astype("<i8").tobytes()
        return hashlib.sha256(content).digest() + content

    @classmethod
    def from_bytes(cls, data: bytes, count: int) -> ScanIndex | None:
        """Return the index of `count` images; None if the file is damaged or has another number of images."""
        content = data[_CHECKSUM_BYTES:]
        if hashlib.sha256(content).digest() != data[:_CHECKSUM_BYTES]:
            return None
        ends = np.cumsum([_ID_BYTES * count, 2 * 4 * count, 3 * 8 * count]).tolist()
        if len(content) != ends[-1]:
            return None
        ids = [content[start : start + _ID_BYTES] for start in range(0, ends[0], _ID_BYTES)]
        sizes = np.frombuffer(content[ends[0] : ends[1]], dtype="<i4").reshape(count, 2).astype(np.int32)
        states = np.frombuffer(content[ends[1] :], dtype="<i8").reshape(count, 3).astype(np.int64)
        return cls(tuple("" if not any(each) else each.hex() for each in ids), sizes, states)


def index_path(root: Path, files: Sequence[Path], version: str) -> Path:
    """Return the path of the index of these files, for one version of the scan."""
    return root / "scans" / f"{hash_text(version, *map(str, files))[:32]}.index"


def read_index(path: Path, count: int) -> ScanIndex | None:
    """Return an index; None if there is none, or if it is damaged."""
    try:
        return ScanIndex.from_bytes(path.read_bytes(), count)
    except OSError:
        return None


def write_index(path: Path, index: ScanIndex) -> None:
    """Write an index durably. A full or failing disk is waited out.

    Raises:
        OSError: it cannot be written.
    """
    data = index.to_bytes()
    patience.wait_out("cache: writing", lambda: write_atomically(path, data))


def find_changed(files: Sequence[Path], states: FileStates) -> list[int]:
    """Return the indices of the files whose states differ from these."""
    bounds = np.linspace(0, len(files), _NUM_READERS + 1).astype(int).tolist()
    found = np.empty((len(files), 3), dtype=np.int64)

    def read(first: int, last: int) -> None:
        for index in range(first, last):
            found[index] = state_of(files[index])

    with ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="states") as pool:
        list(pool.map(read, bounds[:-1], bounds[1:]))
    return [int(index) for index in np.flatnonzero((found != states).any(axis=1))]


def state_of(path: Path) -> tuple[int, int, int]:
    """Return the state of a file. A failing file system is waited out.

    Raises:
        OSError: it cannot be read.
    """
    try:
        stat = os.stat(path)  # noqa: PTH116  called for each image of a data set
    except (FileNotFoundError, NotADirectoryError):
        return NO_FILE
    except OSError:
        stat = patience.wait_out(f"dataset.source: reading the state of {path}", path.stat)
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@dataclass
class FileChecks:
    """Compares files with indexes in the background."""

    _running: list[Future[str | None]] = field(default_factory=list)
    _pool: Any = None

    def start(self, files: Sequence[Path], index: ScanIndex, share: slice, path: Path) -> None:
        """Start to compare files with an index.

        Args:
            files: all files of the index.
            index: the index.
            share: the files that this rank compares.
            path: the file of the index; removed if a file has another state, so that a later attempt writes it again.
        """
        self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="checks")
        expected = (list(files[share]), index.states[share], index.ids[share])
        self._running.append(self._pool.submit(self._find_changed, *expected, path))

    def first_changed(self) -> str | None:
        """Wait for the end of the comparisons. Return the first file whose content has changed; None if none has.

        Raises:
            OSError: a file cannot be read.
        """
        found = [each.result() for each in self._running]
        self._running.clear()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        return next((each for each in found if each is not None), None)

    def _find_changed(self, files: list[Path], states: FileStates, ids: Sequence[str], path: Path) -> str | None:
        changed = find_changed(files, states)
        if changed:
            with contextlib.suppress(OSError):
                path.unlink()
        return next((str(files[index]) for index in changed if _hash(files[index]) != ids[index]), None)


def _hash(path: Path) -> str:
    """Return the SHA-256 of a file, in hex; empty if it does not exist."""

    def read() -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    try:
        return patience.wait_out(f"dataset.source: reading {path}", read)
    except FileNotFoundError:
        return ""
