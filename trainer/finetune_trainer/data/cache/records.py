"""Records of a streamed data set in the cache: its samples, the lengths of its parts, and its conditioning images."""

from __future__ import annotations

import io
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import torch

from finetune_trainer.data.cache.store import Item, TensorCache
from finetune_trainer.data.hashes import hash_text
from finetune_trainer.data.images import decoding
from finetune_trainer.data.sources.stream import Stream

_JSON, _FILE = "json", "file"
_ROWS = "rows"


@dataclass(frozen=True)
class SampleRecord:
    """The record of a sample.

    Attributes:
        image_id: SHA-256 of the image's bytes; empty if they cannot be read.
        size: width and height of the decoded image; zeros if it is broken.
        caption: its first caption; empty if there is none.
        condition_id: SHA-256 of the conditioning image's bytes; empty if there is none.
        is_broken: whether the image or the conditioning image cannot be decoded.
        more_captions: its other captions.
        decoder: version of the decoder that judged whether it is broken; 0 in records of older releases.
    """

    image_id: str
    size: tuple[int, int]
    caption: str
    condition_id: str
    is_broken: bool
    more_captions: tuple[str, ...] = ()
    decoder: int = 0


class SampleRecords:
    """The records of one stream, in the cache that all jobs share.

    Args:
        root: the cache.
        identity: identity of the stream.
    """

    def __init__(self, root: Path, identity: str) -> None:
        self._records = TensorCache(root / "samples" / identity[:32])
        self._conditions = TensorCache(root / "conditions")

    def refresh(self) -> None:
        """Index what other ranks have written since the last call."""
        self._records.refresh()
        self._conditions.refresh()

    def save_index(self) -> None:
        """Write the index files, so that a later attempt opens only what it reads.

        Raises:
            StorageError: they cannot be written.
        """
        self._records.save_index()
        self._conditions.save_index()

    def sweep(self, now: float) -> None:
        """Remove the partial files of killed ranks; `now` is in seconds since the epoch."""
        self._records.sweep(now)
        self._conditions.sweep(now)

    def find(self, key: str) -> SampleRecord | None:
        """Return the record of a sample; None if there is none."""
        written = next((each for each in (_checked_key(key), key) if each in self._records), None)
        if written is None:
            return None
        found = self._read(written)
        lists = {name: tuple(found.get(name, ())) for name in ("size", "more_captions")}
        return SampleRecord(**{**found, **lists})

    def num_rows(self, part: int) -> int | None:
        """Return the number of rows of a part; None if the part has not been read to its end."""
        key = _rows_key(part)
        return int(self._read(key)[_ROWS]) if key in self._records else None

    def has_condition(self, condition_id: str) -> bool:
        """Return whether a conditioning image is in the cache."""
        return condition_id in self._conditions

    def condition(self, condition_id: str) -> bytes:
        """Return the bytes of the file of a conditioning image."""
        return self._conditions.get(condition_id)[_FILE].numpy().tobytes()

    def put(self, records: dict[str, SampleRecord], rows: dict[int, int], conditions: dict[str, bytes]) -> None:
        """Write records, lengths of parts, and conditioning images.

        The conditioning images are written first, so that a record never names one that is missing.

        Raises:
            StorageError: they cannot be written.
        """
        if conditions:
            self._conditions.put({each: {_FILE: _tensor(data)} for each, data in conditions.items()})
        # The cache never replaces an item: the record of an image that was checked again has another key.
        items = {
            _checked_key(key) if key in self._records else key: _item(asdict(record)) for key, record in records.items()
        }
        items |= {_rows_key(part): _item({_ROWS: count}) for part, count in rows.items()}
        if items:
            self._records.put(items)

    def _read(self, key: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._records.get(key)[_JSON].numpy().tobytes())
        return found


class RecordedSamples:
    """The samples of a stream that has been read; see `SampleSet`. Only one number per part is in memory.

    Args:
        stream: the stream.
        records: its records.
        counts: number of samples of each part.
    """

    def __init__(self, stream: Stream, records: SampleRecords, counts: Sequence[int]) -> None:
        self._stream = stream
        self._records = records
        self._starts = [0, *accumulate(counts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def record(self, index: int) -> SampleRecord:
        """Return the record of a sample."""
        found = self._records.find(self._stream.key(*self._locate(index)))
        assert found is not None
        return found

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of a sample."""
        record = self.record(index)
        return (record.caption, *record.more_captions)

    def repeats(self, index: int) -> int:
        """Return the number of times that each epoch uses a sample."""
        return self._stream.repeats(*self._locate(index))

    def open_conditioning(self, index: int) -> IO[bytes]:
        """Open the encoded conditioning image of a sample."""
        return io.BytesIO(self._records.condition(self.record(index).condition_id))

    def name(self, index: int) -> str:
        """Return the name under which a user finds a sample."""
        return self._stream.name(index, *self._locate(index))

    def _locate(self, index: int) -> tuple[int, int]:
        """Return the part and the row of a sample."""
        part = bisect_right(self._starts, index) - 1
        return part, index - self._starts[part]


def _item(content: dict[str, Any]) -> Item:
    return {_JSON: _tensor(json.dumps(content).encode())}


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _checked_key(key: str) -> str:
    return hash_text(key, f"decoder {decoding.VERSION}")


def _rows_key(part: int) -> str:
    return hash_text("rows", str(part))
