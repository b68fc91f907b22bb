"""A tensor that is read in blocks of rows: from a file, from a module, or computed from other tensors of this kind.

Writers call it. A model of any size is converted with the memory of a few blocks.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

BLOCK_BYTES = 1 << 21
"""Upper limit of a block, except for a tensor whose single row is larger."""
LENGTH_BYTES = 8
METADATA = "__metadata__"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Number formats by their names in safetensors files."""
Rows = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Region:
    """The bytes of a tensor in a file.

    Attributes:
        path: the file.
        offset: position of the first byte.
    """

    path: Path
    offset: int


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read in blocks of rows.

    Attributes:
        dtype: number format.
        shape: shape.
        rows: returns the rows from one index to another, on the CPU; of a tensor without dimensions, row 0 is itself.
        region: where exactly these bytes are in a file; None if they must be computed.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    rows: Rows = field(repr=False)
    region: Region | None = None

    @property
    def num_bytes(self) -> int:
        """Return the size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def num_rows(self) -> int:
        """Return the size of the first dimension; 1 without dimensions."""
        return self.shape[0] if self.shape else 1

    @property
    def num_blocks(self) -> int:
        """Return the number of blocks."""
        return -(-self.num_rows // self._rows_per_block) if self.num_bytes else 0

    def tasks(self) -> Iterator[Callable[[], Tensor]]:
        """Yield a function for each block of rows, in order, which returns it."""
        step = self._rows_per_block
        for start in range(0, self.num_rows if self.num_bytes else 0, step):
            yield partial(self.rows, start, min(start + step, self.num_rows))

    @property
    def _rows_per_block(self) -> int:
        return max(1, BLOCK_BYTES // max(1, self.num_bytes // max(1, self.num_rows)))

    def read(self) -> Tensor:
        """Return the complete tensor."""
        if not self.num_bytes:
            return torch.empty(self.shape, dtype=self.dtype)
        return self.rows(0, self.num_rows).reshape(self.shape)

    def to(self, dtype: torch.dtype | None) -> LazyTensor:
        """Return it in another number format; tensors of integers, and None, change nothing."""
        if dtype is None or dtype == self.dtype or not self.dtype.is_floating_point:
            return self
        rows = self.rows
        return LazyTensor(dtype, self.shape, lambda start, stop: rows(start, stop).to(dtype))

    def times(self, factor: float) -> LazyTensor:
        """Return the product with a number."""
        if factor == 1.0:
            return self
        rows = self.rows
        return replace(self, rows=lambda start, stop: rows(start, stop) * factor, region=None)

    def reshape(self, *shape: int) -> LazyTensor:
        """Return it in another shape with the same first dimension."""
        assert shape[0] == self.num_rows and math.prod(shape) == math.prod(self.shape)
        rows = self.rows
        return replace(self, shape=shape, rows=lambda start, stop: rows(start, stop).reshape(stop - start, *shape[1:]))

    def transpose(self) -> LazyTensor:
        """Return the transpose of a matrix. Each block reads the complete matrix: only for small ones."""
        first, second = self.shape
        read = self.read
        return LazyTensor(self.dtype, (second, first), lambda start, stop: read().t()[start:stop].contiguous())

    def cut(self, start: int, stop: int) -> LazyTensor:
        """Return some of the rows."""
        rows = self.rows
        region = self.region
        if region is not None:
            width = self.num_bytes // self.num_rows
            region = Region(region.path, region.offset + start * width)
        return LazyTensor(
            self.dtype, (stop - start, *self.shape[1:]), lambda one, two: rows(start + one, start + two), region
        )


def in_memory(tensor: Tensor) -> LazyTensor:
    """Return a tensor in memory, on any device, as one that is read in blocks."""
    tensor = tensor.detach()
    if tensor.dim() == 0:
        return LazyTensor(tensor.dtype, (), lambda _start, _stop: tensor.cpu().reshape(1))
    return LazyTensor(tensor.dtype, tuple(tensor.shape), lambda start, stop: tensor[start:stop].to("cpu").contiguous())


def join(tensors: Sequence[LazyTensor]) -> LazyTensor:
    """Return tensors of one width as one, below each other."""
    counts = [tensor.num_rows for tensor in tensors]
    first = tensors[0]

    def rows(start: int, stop: int) -> Tensor:
        parts, offset = [], 0
        for tensor, count in zip(tensors, counts, strict=True):
            one, two = max(start - offset, 0), min(stop - offset, count)
            if one < two:
                parts.append(tensor.rows(one, two))
            offset += count
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return LazyTensor(first.dtype, (sum(counts), *first.shape[1:]), rows)


class _Reader:
    """Reads from one file with one descriptor; it is closed with the last tensor that refers to it."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        self._path = path

    def __del__(self) -> None:
        os.close(self._descriptor)

    def read(self, offset: int, size: int) -> Tensor:
        """Return bytes of the file."""
        buffer = torch.empty(size, dtype=torch.uint8)
        view, done = memoryview(buffer.numpy()), 0  # type: ignore[arg-type]
        while done < size:
            count = os.preadv(self._descriptor, [view[done:]], offset + done)
            if count == 0:
                raise OSError(f"{self._path} ends after {offset + done} bytes; it is incomplete")
            done += count
        return buffer


def read_header(path: Path) -> tuple[dict[str, dict[str, object]], dict[str, str], int]:
    """Return the tensors' entries, the metadata and the offset of the data of a safetensors file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a safetensors file.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if length > path.stat().st_size:
            raise ValueError(f"{path} is not a complete safetensors file")
        header = json.loads(file.read(length))
    return header, header.pop(METADATA, {}), LENGTH_BYTES + length


def read_file(path: Path) -> dict[str, LazyTensor]:
    """Return the tensors of a safetensors file; their values are read later.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a safetensors file, or has an unknown number format.
    """
    header, _, data = read_header(path)
    reader = _Reader(path)
    return {name: _stored(reader, path, data, name, entry) for name, entry in header.items()}


def read_files(paths: Sequence[Path]) -> dict[str, LazyTensor]:
    """Return the tensors of all these files; see `read_file`."""
    return {name: tensor for path in paths for name, tensor in read_file(path).items()}


def _stored(reader: _Reader, path: Path, data: int, name: str, entry: Mapping[str, object]) -> LazyTensor:
    shape = tuple(int(size) for size in entry["shape"])  # type: ignore[attr-defined]
    dtype = DTYPES.get(str(entry["dtype"]))
    if dtype is None:
        raise ValueError(f"{path}: {name} has the unknown number format {entry['dtype']}")
    offset = data + int(entry["data_offsets"][0])  # type: ignore[index]
    width = math.prod(shape[1:]) * dtype.itemsize

    def rows(start: int, stop: int) -> Tensor:
        content = reader.read(offset + start * width, (stop - start) * width)
        values = content.view(dtype)
        return values.view(stop - start, *shape[1:]) if shape else values

    return LazyTensor(dtype, shape, rows, Region(path, offset))
