"""The interface of a data set that is read where it is stored, one sample after the other, without copying it.

`open` opens a stream, `cache.stream_map` reads it, and `cache.records` keeps what training needs of each sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

ImageReader = Callable[[], bytes]
"""Reads an image file. Raises DataError if it does not exist, StorageError if it cannot be read now."""


@dataclass(frozen=True)
class StreamedRow:
    """One sample of a stream. Images in separate files have not been read yet.

    Attributes:
        number: number of the row within its part, from 0.
        captions: its captions; empty if there are none.
        image: reads the encoded image.
        conditioning: reads the encoded conditioning image; None if the manifest names no column for it.
    """

    number: int
    captions: tuple[str, ...]
    image: ImageReader
    conditioning: ImageReader | None


class Stream(Protocol):
    """A data set in parts. Each part can be read by itself, starting at any of its rows."""

    @property
    def identity(self) -> str:
        """Hash of the location, of the columns that are read, and of file states that the keys of rows do not cover."""
        ...

    @property
    def state(self) -> str:
        """Hash of everything that the keys of rows depend on. It is equal on all ranks unless the data set changes."""
        ...

    def num_parts(self) -> int:
        """Return the number of parts. Samples are ordered by part, then by row."""
        ...

    def num_rows(self, part: int) -> int | None:
        """Return the number of rows of a part; None if it is unknown before the part is read."""
        ...

    def key(self, part: int, row: int) -> str:
        """Return the key under which the cache stores a row."""
        ...

    def repeats(self, part: int, row: int) -> int:
        """Return the number of times that each epoch uses a row."""
        ...

    def read(self, part: int, first: int) -> Iterator[StreamedRow]:
        """Read the rows of a part, starting at row `first`.

        Raises:
            DataError: the data set cannot be used.
            StorageError: it cannot be read now.
        """
        ...

    def name(self, index: int, part: int, row: int) -> str:
        """Return the name under which a user finds a sample, which has number `index` in the data set."""
        ...
