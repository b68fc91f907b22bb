"""The interface of a data set whose samples can be read by index. `stream` has that of a data set read in order."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import IO, Protocol


class SampleSet(Protocol):
    """The part of a data set that training reads after its images have been encoded."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of a sample, one of which each use of it takes; empty if it has none."""
        ...

    def repeats(self, index: int) -> int:
        """Return the number of times that each epoch uses a sample."""
        ...

    def open_conditioning(self, index: int) -> IO[bytes]:
        """Open the encoded conditioning image of a sample. The manifest must name its column."""
        ...

    def name(self, index: int) -> str:
        """Return the name under which a user finds the sample: its file, or its row."""
        ...


class SampleSource(SampleSet, Protocol):
    """An indexed set of samples whose images can be read at any time."""

    def open(self, index: int) -> IO[bytes]:
        """Open the encoded image (PNG, JPEG, ...) of a sample, as stored."""
        ...

    def file(self, index: int) -> Path | None:
        """Return the file that holds this image and nothing else; None if there is no such file."""
        ...

    def conditioning_file(self, index: int) -> Path | None:
        """Return the file that holds this conditioning image and nothing else; None if there is no such file."""
        ...


def missing_column(field: str, column: str, columns: Iterable[str], where: str) -> str:
    """Return the message for a column of the manifest that the data set lacks.

    Args:
        field: name of the field below `dataset.columns`.
        column: the column that the field names.
        columns: the columns that exist.
        where: the file, row or data set.
    """
    names = ", ".join(sorted(columns)) or "none"
    return (
        f"dataset.columns.{field}: {where} has no column {column!r}; the columns are {names}; "
        f"set dataset.columns.{field} to one of them"
    )
