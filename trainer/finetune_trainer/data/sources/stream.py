"""Data sets that are read where they lie, one sample after the other, and of which nothing is kept but what trains.

What a stream is, and what is remembered of each of its samples. `stream_map` reads one, `open_stream` opens one.
"""

from __future__ import annotations

import io
import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, Protocol

import torch

from finetune_trainer.data.cache.hashes import hash_text
from finetune_trainer.data.cache.store import Item, TensorCache

_JSON, _FILE = "json", "file"
_ROWS = "rows"

Reader = Callable[[], bytes]
"""Reads an image file; DataError where there is none, StorageError where it cannot be read now."""


@dataclass(frozen=True)
class StreamedRow:
    """One sample of a stream, its files not read yet where they lie by themselves.

    Attributes:
        number: within its part, from 0.
        caption: empty where there is none.
        image: reads the encoded image.
        conditioning: reads the encoded conditioning image; None where no column is named.
    """

    number: int
    caption: str
    image: Reader
    conditioning: Reader | None


class Stream(Protocol):
    """A data set in parts, each of which can be read by itself, from any of its rows on."""

    @property
    def identity(self) -> str:
        """Hash of where it lies, of what is taken of it, and of the state of its files, as far as rows have no own."""
        ...

    @property
    def state(self) -> str:
        """Hash of all that its rows are remembered by: the same on all ranks, unless it is being changed."""
        ...

    def num_parts(self) -> int:
        """Number of parts; their order, and that of their rows, is that of the samples."""
        ...

    def num_rows(self, part: int) -> int | None:
        """Number of rows of a part; None where only reading it tells."""
        ...

    def key(self, part: int, row: int) -> str:
        """What a row is remembered by."""
        ...

    def read(self, part: int, first: int) -> Iterator[StreamedRow]:
        """The rows of a part, from one of them on.

        Raises:
            DataError: it cannot be used.
            StorageError: it cannot be read now.
        """
        ...

    def name(self, index: int, part: int, row: int) -> str:
        """How a person finds a sample, the index-th of all."""
        ...


@dataclass(frozen=True)
class Record:
    """What is remembered of a sample.

    Attributes:
        image_id: SHA-256 of the image's bytes; empty where it cannot be read.
        size: width and height as it is seen; zeros where it is broken.
        caption: its caption.
        condition_id: SHA-256 of the conditioning image's bytes; empty where there is none.
        is_broken: whether the image, or the conditioning image, is no whole image.
    """

    image_id: str
    size: tuple[int, int]
    caption: str
    condition_id: str
    is_broken: bool


class Records:
    """What is remembered of a stream: its samples, the lengths of its parts, and its conditioning images."""

    def __init__(self, root: Path, identity: str) -> None:
        self._records = TensorCache(root / "samples" / identity[:32])
        self._conditions = TensorCache(root / "conditions")

    def refresh(self) -> None:
        """Look for what others have written since."""
        self._records.refresh()
        self._conditions.refresh()

    def sweep(self, now: float) -> None:
        """Remove what killed ranks have left half written; `now` in seconds since the epoch."""
        self._records.sweep(now)
        self._conditions.sweep(now)

    def find(self, key: str) -> Record | None:
        """What is remembered of a sample."""
        if key not in self._records:
            return None
        found = self._read(key)
        return Record(**{**found, "size": tuple(found["size"])})

    def num_rows(self, part: int) -> int | None:
        """Number of rows of a part that was read to its end."""
        key = _rows_key(part)
        return int(self._read(key)[_ROWS]) if key in self._records else None

    def has_condition(self, condition_id: str) -> bool:
        """Whether a conditioning image is here."""
        return condition_id in self._conditions

    def condition(self, condition_id: str) -> bytes:
        """A conditioning image as its file was."""
        return self._conditions.get(condition_id)[_FILE].numpy().tobytes()

    def put(self, records: dict[str, Record], rows: dict[int, int], conditions: dict[str, bytes]) -> None:
        """Write samples, lengths of parts, and conditioning images; the latter first, so that samples are whole.

        Raises:
            StorageError: they cannot be written.
        """
        if conditions:
            self._conditions.put({each: {_FILE: _tensor(data)} for each, data in conditions.items()})
        items = {key: _item(asdict(record)) for key, record in records.items()}
        items |= {_rows_key(part): _item({_ROWS: count}) for part, count in rows.items()}
        if items:
            self._records.put(items)

    def _read(self, key: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._records.get(key)[_JSON].numpy().tobytes())
        return found


class StreamedSamples:
    """The samples of a stream that was read; see `Samples`. In memory is one number for each part."""

    def __init__(self, stream: Stream, records: Records, counts: Sequence[int]) -> None:
        self._stream = stream
        self._records = records
        self._starts = [0, *accumulate(counts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def record(self, index: int) -> Record:
        """What is remembered of a sample."""
        found = self._records.find(self._stream.key(*self._place(index)))
        assert found is not None
        return found

    def caption(self, index: int) -> str:
        """Caption of a sample."""
        return self.record(index).caption

    def open_conditioning(self, index: int) -> IO[bytes]:
        """The encoded conditioning image of a sample."""
        return io.BytesIO(self._records.condition(self.record(index).condition_id))

    def name(self, index: int) -> str:
        """How a person finds a sample."""
        return self._stream.name(index, *self._place(index))

    def _place(self, index: int) -> tuple[int, int]:
        part = bisect_right(self._starts, index) - 1
        return part, index - self._starts[part]


def _item(content: dict[str, Any]) -> Item:
    return {_JSON: _tensor(json.dumps(content).encode())}


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _rows_key(part: int) -> str:
    return hash_text("rows", str(part))
