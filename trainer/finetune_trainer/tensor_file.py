"""Safetensors files whose bytes depend only on their contents.

The library's own writer orders metadata by a hash map, whose order differs between processes: two runs with the same
weights would write different files.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

_LENGTH_BYTES = 8
_COPY_BYTES = 1 << 24
_METADATA = "__metadata__"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write named tensors, with sorted metadata.

    Raises:
        OSError: the file cannot be written.
    """
    plain = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    end = _LENGTH_BYTES + int.from_bytes(plain[:_LENGTH_BYTES], "little")
    header = {_METADATA: dict(sorted(metadata.items())), **json.loads(plain[_LENGTH_BYTES:end])}
    with path.open("wb") as file:
        file.write(_pack_header(header))
        file.write(memoryview(plain)[end:])


def copy_renamed(source: Path, target: Path, rename: Callable[[str], str]) -> None:
    """Copy a file with other names of its tensors. The tensors are streamed, not loaded.

    Args:
        source: the file to read.
        target: the file to write, another one.
        rename: returns the new name of a tensor.

    Raises:
        OSError: a file cannot be read or written.
    """
    with source.open("rb") as file, target.open("wb") as copy:
        header = json.loads(file.read(int.from_bytes(file.read(_LENGTH_BYTES), "little")))
        metadata = {_METADATA: header.pop(_METADATA)} if _METADATA in header else {}
        copy.write(_pack_header(metadata | {rename(name): entry for name, entry in header.items()}))
        shutil.copyfileobj(file, copy, _COPY_BYTES)


def _pack_header(header: Mapping[str, object]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    # Offsets start at the end of the header, which is padded to align the data.
    text += b" " * (-len(text) % _LENGTH_BYTES)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def count_numbers(paths: Iterable[Path]) -> int:
    """Return the number of elements in the safetensors files among these paths. Only the headers are read.

    Raises:
        OSError: a file cannot be read.
    """
    total = 0
    for path in paths:
        if path.suffix == ".safetensors":
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(_LENGTH_BYTES), "little")))
            total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != _METADATA)
    return total
