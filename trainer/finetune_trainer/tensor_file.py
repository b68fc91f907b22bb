"""Safetensors files whose bytes follow from their contents alone.

The library's own writer puts metadata in the order of a hash map, which differs from process to process; two runs that
trained the same weights would write different files.
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
    """Write named tensors with metadata, sorted.

    Raises:
        OSError: the file cannot be written.
    """
    plain = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    end = _LENGTH_BYTES + int.from_bytes(plain[:_LENGTH_BYTES], "little")
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(plain[_LENGTH_BYTES:end])}
    text = json.dumps(header, separators=(",", ":")).encode()
    # Offsets count from the end of the header, which is padded so that the data is aligned.
    text += b" " * (-len(text) % _LENGTH_BYTES)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little"))
        file.write(text)
        file.write(memoryview(plain)[end:])


def count_numbers(paths: Iterable[Path]) -> int:
    """How many numbers the safetensors files among these hold, by their headers alone.

    Raises:
        OSError: one cannot be read.
    """
    total = 0
    for path in paths:
        if path.suffix == ".safetensors":
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(_LENGTH_BYTES), "little")))
            total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total
