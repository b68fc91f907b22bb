"""Fingerprints of weight files: hashes that change with every training, but read a small part of a large file.

A training, a merge or a conversion changes all elements of a tensor that it changes at all. So the header of a
safetensors file and a block in the middle of each tensor identify the weights. A single changed bit elsewhere is not
found; checksums of the storage are for that.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BLOCK_BYTES = 4096
WHOLE_BYTES = 1024 * 1024
"""Smaller files are hashed completely."""
_NUM_BLOCKS = 1024
"""Blocks that are read of a large file in another format."""
_MAX_HEADER_BYTES = 100 * 1024 * 1024
_NUM_READERS = 8
"""Blocks that are read at the same time: on network storage each takes a round trip."""


def fingerprint_files(files: Iterable[Path]) -> dict[str, str]:
    """Return the fingerprints of a base's files by name, e.g. 'unet/config.json'.

    Raises:
        OSError: a file cannot be read.
    """
    return {f"{path.parent.name}/{path.name}": fingerprint(path) for path in files}


def fingerprint(path: Path) -> str:
    """Return the fingerprint of one file, in hex. It does not depend on the name and on times.

    Raises:
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size} ".encode())
    with path.open("rb") as file, ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="fingerprint") as pool:
        descriptor = file.fileno()
        blocks = [(0, size)] if size <= WHOLE_BYTES else list(_blocks(descriptor, size))
        for block in pool.map(lambda where: os.pread(descriptor, where[1], where[0]), blocks):
            digest.update(block)
    return digest.hexdigest()


def _blocks(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield offset and length of the parts of a large file to read."""
    tensors = _tensors(descriptor, size)
    if tensors is None:
        step = max(BLOCK_BYTES, (size - BLOCK_BYTES) // (_NUM_BLOCKS - 1))
        yield from ((offset, BLOCK_BYTES) for offset in range(0, size, step))
        yield size - BLOCK_BYTES, BLOCK_BYTES
        return
    start, spans = tensors
    yield 0, start
    for first, last in spans:
        length = min(BLOCK_BYTES, last - first)
        yield start + (first + last - length) // 2, length


def _tensors(descriptor: int, size: int) -> tuple[int, list[tuple[int, int]]] | None:
    """Return where the data of a safetensors file begins, and the bounds of each tensor; None for another file."""
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
        return None
    try:
        header = json.loads(os.pread(descriptor, length, 8))
        found = [tuple(each["data_offsets"]) for name, each in header.items() if name != "__metadata__"]
        spans = sorted((int(first), int(last)) for first, last in found)
    except (ValueError, AttributeError, KeyError, TypeError):
        return None
    start = 8 + length
    return (start, spans) if all(0 <= first <= last <= size - start for first, last in spans) else None
