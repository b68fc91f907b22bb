"""The map phase of a stream: each image is read once, by one rank, and what training needs of it goes into the cache.

The ranks share whole parts where each gets as many, so that a part goes over the network once. Of the parts left over,
and where there are fewer than ranks, each reads all and encodes every nth row: encoding is what takes long.
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

from finetune_trainer.data.cache.encode import SHARD_ITEMS, SHARD_SECONDS, LatentStore
from finetune_trainer.data.cache.store import Item
from finetune_trainer.data.images import decoding
from finetune_trainer.data.images.decoding import View
from finetune_trainer.data.images.scan import ImageScan
from finetune_trainer.data.sources.base import whole_image
from finetune_trainer.data.sources.stream import Reader, Record, Records, Stream, StreamedRow, StreamedSamples
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import DataError, StorageError

_LOG = logging.getLogger(__name__)
MEET_SECONDS = 60.0
"""The ranks meet so often, so that none waits for the others longer than a collective may take."""
_AT_ONCE = 8
"""Images that are read and decoded ahead of the encoder."""


@dataclass(frozen=True)
class Share:
    """The rows that a rank encodes.

    Attributes:
        rank: number of the rank.
        size: number of ranks.
        num_whole: the first so many parts are shared as wholes, the others by rows.
    """

    rank: int
    size: int
    num_whole: int

    @classmethod
    def of(cls, world: World, counts: Sequence[int | None], limit: int | None) -> Share:
        """A rank's share of the first `limit` rows of parts with so many rows each, where that is known."""
        if limit is None:
            num_used = len(counts)
        elif None in counts:
            num_used = 0
        else:
            ends = accumulate(number or 0 for number in counts)
            num_used = next((part + 1 for part, end in enumerate(ends) if end >= limit), len(counts))
        return cls(world.rank, world.size, num_used // world.size * world.size)

    def reads(self, part: int) -> bool:
        """Whether any row of a part is among them."""
        return part >= self.num_whole or part % self.size == self.rank

    def has(self, part: int, row: int) -> bool:
        """Whether a row is among them."""
        return self.reads(part) and (part < self.num_whole or row % self.size == self.rank)


@dataclass(frozen=True)
class Seen:
    """A row whose files were read.

    Attributes:
        key: what it is remembered by.
        record: what is remembered.
        image: decoded; None where it is broken.
        condition: bytes of the conditioning image; empty where there is none.
    """

    key: str
    record: Record
    image: Image.Image | None
    condition: bytes


@dataclass
class _Unwritten:
    """What was made of rows and is not in the cache yet."""

    latents: dict[str, Item] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)
    rows: dict[int, int] = field(default_factory=dict)
    conditions: dict[str, bytes] = field(default_factory=dict)
    since: float = field(default_factory=time.monotonic)

    @property
    def is_due(self) -> bool:
        """Whether it is to be written now: a preemption would lose it."""
        return len(self.records) >= SHARD_ITEMS or time.monotonic() - self.since > SHARD_SECONDS


class _Counted:
    """Rows that are counted as they pass."""

    def __init__(self, rows: Iterable[StreamedRow]) -> None:
        self._rows = rows
        self.count = 0

    def __iter__(self) -> Iterator[StreamedRow]:
        for row in self._rows:
            self.count += 1
            yield row


class StreamMap:
    """Reads a stream, as far as the cache lacks something of it; all ranks take part.

    Args:
        stream: what is read.
        store: where the images' posteriors go.
        root: the cache that all jobs share.
        world: the ranks.
        views: what is encoded of each image.
        limit: only the first so many samples; None for all.
        say: told what a person may want to know.
    """

    def __init__(  # noqa: PLR0913, PLR0917  all of it differs from call to call
        self,
        stream: Stream,
        store: LatentStore,
        root: Path,
        world: World,
        views: Sequence[View],
        limit: int | None,
        say: Callable[[str], None],
    ) -> None:
        self._stream = stream
        self._store = store
        self._records = Records(root, stream.identity)
        self._world = world
        self._views = views
        self._limit = limit
        self._say = say
        self._encode: Callable[[Image.Image, View], Item] | None = None
        self._unwritten = _Unwritten()
        self._num_done = 0
        self._met_at = time.monotonic()

    def run(self) -> tuple[StreamedSamples, ImageScan, list[int]]:
        """Read what is missing.

        Returns:
            The samples, their images' hashes and sizes, and which of them are broken.

        Raises:
            DataError: the data set cannot be used.
            StorageError: it cannot be read now, or the cache cannot be written.
        """
        if self._world.share(self._stream.state) != self._stream.state:
            raise StorageError("dataset.source: it was changed while the ranks opened it; it is opened anew")
        if self._world.is_first:
            self._records.sweep(time.time())
            self._store.cache.sweep(time.time())
        self._refresh()
        counts = [self._stream.num_rows(part) for part in range(self._stream.num_parts())]
        self._map_together(Share.of(self._world, counts, self._limit))
        # Where the ranks share no disk, each reads for itself what the others have read for themselves.
        return self._result(self._map_together(Share(0, 1, 0)))

    def _map_together(self, share: Share) -> list[int]:
        counts = self._map(share)
        while min(self._world.gather_numbers(1)) == 0:
            # Another rank is not done and has only said so.
            pass
        if self._num_done:
            _LOG.info("stream: %d images read by rank %d", self._num_done, self._world.rank)
        self._num_done = 0
        self._refresh()
        return counts

    def _refresh(self) -> None:
        self._records.refresh()
        self._store.cache.refresh()

    def _map(self, share: Share) -> list[int]:
        """Map a share of the rows; the numbers of rows of the parts read are those of all parts where it has all."""
        counts: list[int] = []
        for part in range(self._stream.num_parts()):
            left = None if self._limit is None else self._limit - sum(counts)
            if left == 0:
                break
            counts.append(self._map_part(part, share, left))
        self._write()
        return counts

    def _map_part(self, part: int, share: Share, left: int | None) -> int:
        """Map a share of a part, or of its first rows; returns how many rows it has, or there are left to take."""
        known = self._num_rows(part)
        if not share.reads(part) and (known is not None or self._limit is None):
            return known or 0
        ends = [end for end in (known, left) if end is not None]
        end = min(ends) if ends else None
        first = self._first_missing(part, share, end, known)
        if first is None:
            assert end is not None
            return end
        rows = _Counted(islice(self._stream.read(part, first), None if end is None else end - first))
        for seen in self._look(rows, part, share):
            self._take(seen)
        if known is None and first + rows.count != end:
            self._unwritten.rows[part] = first + rows.count
        return first + rows.count

    def _num_rows(self, part: int) -> int | None:
        known = self._stream.num_rows(part)
        return self._records.num_rows(part) if known is None else known

    def _first_missing(self, part: int, share: Share, end: int | None, known: int | None) -> int | None:
        """Where to begin to read: the first row of the share that is not in the cache, None where there is nothing."""
        rows = count() if end is None else range(end)
        first = next((row for row in rows if share.has(part, row) and not self._is_there(part, row)), None)
        if first is None and known is None and end and self._records.find(self._stream.key(part, end - 1)) is None:
            # Whether there are so many rows is not known.
            return end - 1
        return first

    def _is_there(self, part: int, row: int) -> bool:
        record = self._records.find(self._stream.key(part, row))
        if record is None:
            return False
        if record.is_broken:
            return True
        if record.condition_id and not self._records.has_condition(record.condition_id):
            return False
        return all(self._store.key(record.image_id, view) in self._store.cache for view in self._views)

    def _look(self, rows: Iterable[StreamedRow], part: int, share: Share) -> Iterator[Seen]:
        """Read and decode those of the rows that are missing some way ahead, in their order."""
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="stream") as pool:
            ahead: deque[Future[Seen]] = deque()
            for row in rows:
                if share.has(part, row.number) and not self._is_there(part, row.number):
                    ahead.append(pool.submit(look, row, self._stream.key(part, row.number)))
                if len(ahead) == _AT_ONCE:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def _take(self, seen: Seen) -> None:
        """Encode a row, and write what was made of the last ones where it is time to."""
        unwritten, record = self._unwritten, seen.record
        if seen.image is not None and not record.is_broken:
            for view in self._views:
                key = self._store.key(record.image_id, view)
                if key not in self._store.cache and key not in unwritten.latents:
                    if self._encode is None:
                        self._encode = self._store.make_encoder(self._world.device)
                    unwritten.latents[key] = self._encode(seen.image, view)
        if record.condition_id and not self._records.has_condition(record.condition_id):
            unwritten.conditions[record.condition_id] = seen.condition
        unwritten.records[seen.key] = record
        self._num_done += 1
        self._say(f"{self._num_done} images read")
        if unwritten.is_due:
            self._write()
        if time.monotonic() - self._met_at > MEET_SECONDS:
            self._world.gather_numbers(0)
            self._met_at = time.monotonic()

    def _write(self) -> None:
        unwritten = self._unwritten
        if unwritten.latents:
            self._store.cache.put(unwritten.latents)
        self._records.put(unwritten.records, unwritten.rows, unwritten.conditions)
        self._unwritten = _Unwritten()

    def _result(self, counts: Sequence[int]) -> tuple[StreamedSamples, ImageScan, list[int]]:
        samples = StreamedSamples(self._stream, self._records, counts)
        ids: list[str] = []
        sizes = np.zeros((len(samples), 2), dtype=np.int32)
        broken: list[int] = []
        for index in range(len(samples)):
            record = samples.record(index)
            ids.append(record.image_id)
            sizes[index] = record.size
            if record.is_broken:
                broken.append(index)
        return samples, ImageScan(tuple(ids), sizes), broken


def look(row: StreamedRow, key: str) -> Seen:
    """Read and decode a row's files.

    Raises:
        StorageError: they cannot be read now.
    """
    image, image_id, _ = _decode(row.image)
    size = (0, 0) if image is None else image.size
    is_broken, condition_id, condition = image is None, "", b""
    if row.conditioning is not None:
        decoded, condition_id, condition = _decode(row.conditioning)
        is_broken |= decoded is None
    return Seen(key, Record(image_id, size, row.caption, condition_id, is_broken), image, condition)


def _decode(reader: Reader) -> tuple[Image.Image | None, str, bytes]:
    """An image, None where it is broken; the hash of its bytes, empty where there are none; and these."""
    try:
        data = reader()
    except DataError:
        return None, "", b""
    image_id = hashlib.sha256(data).hexdigest()
    try:
        with whole_image(image_id):
            return decoding.decode(io.BytesIO(data)), image_id, data
    except DataError:
        return None, image_id, data
