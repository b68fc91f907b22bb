"""The map phase of a stream: one rank reads each image once, and stores what training needs of it in the cache.

As many parts as the ranks can share equally are assigned to single ranks, so that each of them is transferred once.
The remaining parts are read by all ranks, and each rank encodes every nth row, because encoding takes most of the time.
"""

from __future__ import annotations

import hashlib
import io
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate, count, islice
from pathlib import Path

import numpy as np
from PIL import Image

from finetune_trainer import patience
from finetune_trainer.data.cache.encode import SHARD_ITEMS, SHARD_SECONDS, LatentStore
from finetune_trainer.data.cache.image_scan import ImageScan
from finetune_trainer.data.cache.records import RecordedSamples, SampleRecord, SampleRecords
from finetune_trainer.data.cache.sample_identity import SampleHasher, SampleIdentity
from finetune_trainer.data.cache.store import Item
from finetune_trainer.data.images import decoding
from finetune_trainer.data.images.decoding import CropView, image_errors
from finetune_trainer.data.sources.stream import ImageReader, Stream, StreamedRow
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import DataError, StorageError

_LOG = logging.getLogger(__name__)
SYNC_SECONDS = 60.0
"""Interval at which the ranks synchronize, so that no rank waits longer than the timeout of a collective."""
_READ_AHEAD = 8
"""Number of images that are read and decoded ahead of the encoder."""


@dataclass(frozen=True)
class RowShare:
    """The rows that a rank encodes.

    Attributes:
        rank: number of the rank.
        size: number of ranks.
        num_assigned: number of parts, from the first, that are assigned to single ranks; the others are shared by rows.
    """

    rank: int
    size: int
    num_assigned: int

    @classmethod
    def of(cls, world: World, counts: Sequence[int | None], limit: int | None) -> RowShare:
        """Return a rank's share.

        Args:
            world: the rank and the number of ranks.
            counts: number of rows of each part; None if it is unknown.
            limit: only the first `limit` rows are encoded; None for all.
        """
        if limit is None:
            num_used = len(counts)
        elif None in counts:
            num_used = 0
        else:
            ends = accumulate(number or 0 for number in counts)
            num_used = next((part + 1 for part, end in enumerate(ends) if end >= limit), len(counts))
        return cls(world.rank, world.size, num_used // world.size * world.size)

    def reads(self, part: int) -> bool:
        """Return whether the share has any row of a part."""
        return part >= self.num_assigned or part % self.size == self.rank

    def has(self, part: int, row: int) -> bool:
        """Return whether the share has a row."""
        return self.reads(part) and (part < self.num_assigned or row % self.size == self.rank)


@dataclass(frozen=True)
class DecodedRow:
    """A row whose files have been read.

    Attributes:
        key: key of the record in the cache.
        record: its record.
        image: the decoded image; None if it is broken.
        condition: bytes of the conditioning image; empty if there is none.
    """

    key: str
    record: SampleRecord
    image: Image.Image | None
    condition: bytes


@dataclass
class _Unwritten:
    """Results of rows that are not in the cache yet."""

    latents: dict[str, Item] = field(default_factory=dict)
    records: dict[str, SampleRecord] = field(default_factory=dict)
    rows: dict[int, int] = field(default_factory=dict)
    conditions: dict[str, bytes] = field(default_factory=dict)
    since: float = field(default_factory=time.monotonic)

    @property
    def is_due(self) -> bool:
        """Return whether it is time to write: a preemption loses what has not been written."""
        return len(self.records) >= SHARD_ITEMS or time.monotonic() - self.since > SHARD_SECONDS


class _CountedRows:
    """Iterates over rows and counts them."""

    def __init__(self, rows: Iterable[StreamedRow]) -> None:
        self._rows = rows
        self.count = 0

    def __iter__(self) -> Iterator[StreamedRow]:
        for row in self._rows:
            self.count += 1
            yield row


class StreamMap:
    """Reads the rows of a stream that the cache lacks, and stores their results. All ranks take part.

    Args:
        stream: the data set.
        store: stores the images' posteriors.
        root: the cache that all jobs share.
        world: the ranks.
        views: the views of each image to encode.
        limit: only the first `limit` samples; None for all.
        report: receives lines on the progress.
    """

    def __init__(  # noqa: PLR0913, PLR0917  every argument differs between the calls
        self,
        stream: Stream,
        store: LatentStore,
        root: Path,
        world: World,
        views: Sequence[CropView],
        limit: int | None,
        report: Callable[[str], None],
    ) -> None:
        self._stream = stream
        self._store = store
        self._records = SampleRecords(root, stream.identity)
        self._world = world
        self._views = views
        self._limit = limit
        self._report = report
        self._encode: Callable[[Image.Image, CropView], Item] | None = None
        self._unwritten = _Unwritten()
        self._num_done = 0
        self._synchronized_at = time.monotonic()
        self.identity = SampleIdentity("", b"")
        """Identity of the samples; complete after `run`."""

    def run(self) -> tuple[RecordedSamples, ImageScan, list[int]]:
        """Read and encode the rows that the cache lacks.

        Returns:
            The samples, the hashes and sizes of their images, and the indices of the broken samples.

        Raises:
            DataError: the data set cannot be used.
            StorageError: it cannot be read now, or the cache cannot be written.
        """
        if self._world.share(self._stream.state) != self._stream.state:
            raise StorageError(
                "dataset.source: the data set changed while the ranks opened it; the next attempt opens it again"
            )
        if self._world.is_first:
            self._records.sweep(time.time())
            self._store.cache.sweep(time.time())
        self._refresh()
        counts = [self._stream.num_rows(part) for part in range(self._stream.num_parts())]
        self._map_together(RowShare.of(self._world, counts, self._limit))
        # If the ranks share no disk, each rank also reads the rows that the other ranks have stored on their disks.
        complete = self._map_together(RowShare(0, 1, 0))
        if self._world.local_rank == 0:
            self._records.save_index()
            self._store.cache.save_index()
        return self._result(complete)

    def _map_together(self, share: RowShare) -> list[int]:
        counts = self._map(share)
        # Ranks that are still reading send 0 at each synchronization.
        while min(self._world.gather_numbers(1)) == 0:
            pass
        if self._num_done:
            _LOG.info("stream: %d images read by rank %d", self._num_done, self._world.rank)
        self._num_done = 0
        self._refresh()
        return counts

    def _refresh(self) -> None:
        self._records.refresh()
        self._store.cache.refresh()

    def _map(self, share: RowShare) -> list[int]:
        """Map a share of the rows. Return the number of rows of each part; a part of other ranks may count as 0."""
        counts: list[int] = []
        for part in range(self._stream.num_parts()):
            left = None if self._limit is None else self._limit - sum(counts)
            if left == 0:
                break
            counts.append(self._map_part(part, share, left))
        self._write()
        return counts

    def _map_part(self, part: int, share: RowShare, left: int | None) -> int:
        """Map a share of a part.

        Returns:
            The number of rows of the part, at most `left`; 0 if the share has none of them and the number is unknown.
        """
        known = self._num_rows(part)
        if not share.reads(part) and (known is not None or self._limit is None):
            return known or 0
        ends = [end for end in (known, left) if end is not None]
        end = min(ends) if ends else None
        first = self._first_missing(part, share, end, known)
        if first is None:
            assert end is not None
            return end
        rows = _CountedRows(islice(self._read(part, first), None if end is None else end - first))
        for decoded in self._decode_rows(rows, part, share):
            self._encode_row(decoded)
        if known is None and first + rows.count != end:
            self._unwritten.rows[part] = first + rows.count
        return first + rows.count

    def _read(self, part: int, first: int) -> Iterator[StreamedRow]:
        """Read the rows of a part. After an outage, continue at the next row."""
        rows = self._stream.read(part, first)

        def read_next() -> StreamedRow | None:
            nonlocal rows
            try:
                return next(rows, None)
            except Exception:
                rows = self._stream.read(part, first)
                raise

        while (row := patience.wait_out(f"dataset.source: reading part {part}", read_next)) is not None:
            first = row.number + 1
            yield row

    def _num_rows(self, part: int) -> int | None:
        known = self._stream.num_rows(part)
        return self._records.num_rows(part) if known is None else known

    def _first_missing(self, part: int, share: RowShare, end: int | None, known: int | None) -> int | None:
        """Return the first row of the share that the cache lacks; None if it has all of them."""
        rows = count() if end is None else range(end)
        first = next((row for row in rows if share.has(part, row) and not self._is_cached(part, row)), None)
        if first is None and known is None and end and self._records.find(self._stream.key(part, end - 1)) is None:
            # The number of rows is unknown: read the last row that is needed, to learn whether it exists.
            return end - 1
        return first

    def _is_cached(self, part: int, row: int) -> bool:
        record = self._records.find(self._stream.key(part, row))
        if record is None:
            return False
        if record.is_broken:
            # A newer decoder may be able to read it.
            return record.decoder == decoding.VERSION
        if record.condition_id and not self._records.has_condition(record.condition_id):
            return False
        return all(self._store.key(record.image_id, view) in self._store.cache for view in self._views)

    def _decode_rows(self, rows: Iterable[StreamedRow], part: int, share: RowShare) -> Iterator[DecodedRow]:
        """Read and decode the rows of the share that the cache lacks, ahead of the encoder. Yield them in order."""
        with ThreadPoolExecutor(_READ_AHEAD, thread_name_prefix="stream") as pool:
            ahead: deque[Future[DecodedRow]] = deque()
            for row in rows:
                if share.has(part, row.number) and not self._is_cached(part, row.number):
                    ahead.append(pool.submit(decode_row, row, self._stream.key(part, row.number)))
                if len(ahead) == _READ_AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def _encode_row(self, decoded: DecodedRow) -> None:
        """Encode a row. Write the results, and synchronize the ranks, when it is time to."""
        unwritten, record = self._unwritten, decoded.record
        if decoded.image is not None and not record.is_broken:
            for view in self._views:
                key = self._store.key(record.image_id, view)
                if key not in self._store.cache and key not in unwritten.latents:
                    if self._encode is None:
                        self._encode = self._store.make_encoder(self._world.device)
                    unwritten.latents[key] = self._encode(decoded.image, view)
        if record.condition_id and not self._records.has_condition(record.condition_id):
            unwritten.conditions[record.condition_id] = decoded.condition
        unwritten.records[decoded.key] = record
        self._num_done += 1
        self._report(f"{self._num_done} images read")
        if unwritten.is_due:
            self._write()
        if time.monotonic() - self._synchronized_at > SYNC_SECONDS:
            self._world.gather_numbers(0)
            self._synchronized_at = time.monotonic()

    def _write(self) -> None:
        unwritten = self._unwritten
        if unwritten.latents:
            self._store.cache.put(unwritten.latents)
        self._records.put(unwritten.records, unwritten.rows, unwritten.conditions)
        self._unwritten = _Unwritten()

    def _result(self, counts: Sequence[int]) -> tuple[RecordedSamples, ImageScan, list[int]]:
        samples = RecordedSamples(self._stream, self._records, counts)
        ids: list[str] = []
        hasher = SampleHasher()
        sizes = np.zeros((len(samples), 2), dtype=np.int32)
        broken: list[int] = []
        for index in range(len(samples)):
            record = samples.record(index)
            ids.append(record.image_id)
            captions = (record.caption, *record.more_captions)
            hasher.add(record.image_id, record.condition_id, samples.repeats(index), captions)
            sizes[index] = record.size
            if record.is_broken:
                broken.append(index)
        self.identity = hasher.identity
        return samples, ImageScan(tuple(ids), sizes), broken


def decode_row(row: StreamedRow, key: str) -> DecodedRow:
    """Read and decode the files of a row.

    Raises:
        StorageError: they cannot be read now.
    """
    image, image_id, _ = _decode(row.image)
    size = (0, 0) if image is None else image.size
    is_broken, condition_id, condition = image is None, "", b""
    if row.conditioning is not None:
        decoded, condition_id, condition = _decode(row.conditioning)
        is_broken |= decoded is None
    caption, *more = row.captions or ("",)
    record = SampleRecord(image_id, size, caption, condition_id, is_broken, tuple(more), decoding.VERSION)
    return DecodedRow(key, record, image, condition)


def _decode(reader: ImageReader) -> tuple[Image.Image | None, str, bytes]:
    """Return an image (None if it is broken), the hash of its bytes (empty if there are none), and the bytes."""
    try:
        data = patience.wait_out("dataset.source: reading an image", reader)
    except DataError:
        return None, "", b""
    image_id = hashlib.sha256(data).hexdigest()
    try:
        with image_errors(image_id):
            return decoding.decode(io.BytesIO(data)), image_id, data
    except DataError:
        return None, image_id, data
