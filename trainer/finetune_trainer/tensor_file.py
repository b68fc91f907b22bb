"""Safetensors files whose bytes depend only on their contents.

The library's own writer orders metadata by a hash map, whose order differs between processes: two runs with the same
weights would write different files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

_LENGTH_BYTES = 8


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write named tensors, with sorted metadata.

    Raises:
        OSError: the file cannot be written.
    """
    plain = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    end = _LENGTH_BYTES + int.from_bytes(plain[:_LENGTH_BYTES], "little")
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(plain[_LENGTH_BYTES:end])}
    text = json.dumps(header, separators=(",", ":")).encode()
    # Offsets start at the end of the header, which is padded to align the data.
    text += b" " * (-len(text) % _LENGTH_BYTES)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little"))
        file.write(text)
        file.write(memoryview(plain)[end:])


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
            total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total
