"""Reads the model's files in a standby pod, so that its ranks find them in the page cache."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

CHUNK_BYTES = 16 * 2**20


def read_ahead(base: str) -> threading.Thread:
    """Read the files of a base model that is a folder or a file, in a separate thread.

    Files that cannot be read are skipped: the ranks report them.
    """
    thread = threading.Thread(target=_read_all, args=(Path(base),), daemon=True, name="read-ahead")
    thread.start()
    return thread


def _read_all(base: Path) -> None:
    buffer = bytearray(CHUNK_BYTES)
    for path in _files(base):
        try:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        except OSError:
            continue


def _files(base: Path) -> Iterator[Path]:
    if base.is_file():
        yield base
    elif base.is_dir():
        yield from (path for path in sorted(base.rglob("*")) if path.is_file())
