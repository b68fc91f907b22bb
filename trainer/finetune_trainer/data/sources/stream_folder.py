"""Streaming a folder, or a .jsonl file beside its images: each file is read by itself, so nothing is read in vain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, partial

from finetune_trainer.data.cache.hashes import hash_text
from finetune_trainer.data.sources.filesystems import Place
from finetune_trainer.data.sources.folder import Row
from finetune_trainer.data.sources.stream import StreamedRow
from finetune_trainer.errors import DataError


class FolderStream:
    """The samples of a folder; see `Stream`. What is remembered of one holds until one of its files changes."""

    def __init__(self, place: Place, below: str, rows: Sequence[Row]) -> None:
        self._place = place
        self._start = f"{below}/" if below else ""
        self._rows = rows

    @property
    def identity(self) -> str:
        """Hash of where it lies."""
        return hash_text("folder", self._place.url, self._start)

    def num_parts(self) -> int:
        """One: the ranks can share its rows without reading anything twice."""
        return 1

    def num_rows(self, part: int) -> int:
        """Number of rows."""
        del part
        return len(self._rows)

    def key(self, part: int, row: int) -> str:
        """Hash of the caption, and of the files' names and stamps, as they were at first."""
        del part
        return self._keys[row]

    @cached_property
    def state(self) -> str:
        """Hash of all keys."""
        return hash_text(*self._keys)

    @cached_property
    def _keys(self) -> list[str]:
        return [self._make_key(sample) for sample in self._rows]

    def _make_key(self, sample: Row) -> str:
        conditioning = [] if sample.conditioning is None else [sample.conditioning, self._stamp(sample.conditioning)]
        return hash_text(sample.caption, sample.image, self._stamp(sample.image), *conditioning)

    def read(self, part: int, first: int) -> Iterator[StreamedRow]:
        """The rows from one of them on; none of their files is read yet."""
        for row in range(first, self.num_rows(part)):
            sample = self._rows[row]
            conditioning = None if sample.conditioning is None else partial(self._read, sample.conditioning)
            yield StreamedRow(row, sample.caption, partial(self._read, sample.image), conditioning)

    def name(self, index: int, part: int, row: int) -> str:
        """Path or URL of the image."""
        del part, row
        return f"{self._place.url}/{self._start}{self._rows[index].image}"

    def _stamp(self, name: str) -> str:
        return self._place.stamp(f"{self._start}{name}") or "missing"

    def _read(self, name: str) -> bytes:
        if self._place.stamp(f"{self._start}{name}") is None:
            raise DataError(f"dataset.source: there is no {self._place.url}/{self._start}{name}")
        return self._place.read(f"{self._start}{name}")
