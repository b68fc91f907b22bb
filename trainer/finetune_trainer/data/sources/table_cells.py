"""Reads the cells of a table: captions, and images that are stored in a cell or named by it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO

from finetune_contract.input_spec import Columns
from finetune_trainer.data.hashes import hash_text
from finetune_trainer.data.sources.base import missing_column
from finetune_trainer.data.sources.stream import ImageReader, StreamedRow
from finetune_trainer.errors import DataError, RankError, StorageError

_MAX_SHOWN = 80
"""Characters of a wrong cell that a message repeats."""


@dataclass(frozen=True)
class TableColumns:
    """The columns that training reads of a table.

    Attributes:
        columns: the manifest's names.
        needs_captions: whether there must be a caption in each row.
        source: the manifest's name of the data set.
    """

    columns: Columns
    needs_captions: bool
    source: str

    @property
    def images(self) -> dict[str, str]:
        """Names of the columns that hold images, by field."""
        found = {"image": self.columns.image}
        return found if self.columns.conditioning is None else {**found, "conditioning": self.columns.conditioning}

    def check(self, existing: Iterable[Any]) -> None:
        """Refuse a table that lacks a column.

        Raises:
            DataError: with the field and the columns that exist.
        """
        names = [str(name) for name in existing]
        required = self.images | ({"caption": self.columns.caption} if self.needs_captions else {})
        for field, column in required.items():
            if column not in names:
                raise DataError(missing_column(field, column, names, self.source))

    def select(self, existing: Sequence[str]) -> list[str]:
        """Return the names of the columns to read."""
        caption = [self.columns.caption] if self.columns.caption in existing else []
        return [*self.images.values(), *caption]

    def make_row(self, number: int, cells: Mapping[str, Any], name: str) -> StreamedRow:
        """Return a row of a stream. Its images are in memory already, or in files that the cells name.

        Raises:
            DataError: its caption is not a text, or it lacks a column.
        """
        readers = {field: self._reader(cells, field, column, name) for field, column in self.images.items()}
        captions = read_captions(cells.get(self.columns.caption), name, self.needs_captions)
        return StreamedRow(number, captions, readers["image"], readers.get("conditioning"))

    def hash_files(self, kind: str, files: Sequence[tuple[str, str]]) -> str:
        """Return the identity of a stream over files, given as pairs of URL and stamp."""
        columns = [self.columns.image, self.columns.caption, self.columns.conditioning or ""]
        return hash_text(kind, *columns, *(part for file in files for part in file))

    def _reader(self, cells: Mapping[str, Any], field: str, column: str, name: str) -> ImageReader:
        if column not in cells:
            raise DataError(missing_column(field, column, cells, self.source))
        check_single(cells[column], field, column, name)
        return partial(_read_cell, cells[column], field, column, name)


@dataclass(frozen=True)
class TableFile:
    """One file of a table.

    Attributes:
        url: its path or URL.
        stamp: a text that changes when the file changes.
        open: opens it for reading at any offset.
    """

    url: str
    stamp: str
    open: Callable[[], contextlib.AbstractContextManager[BinaryIO]]


class TableStream:
    """Common part of the streams of tables: a row's key is its position, and the identity covers the files.

    Args:
        identity: hash of the columns, and of the URLs and stamps of the files.
    """

    def __init__(self, identity: str) -> None:
        self.identity = identity
        self.state = identity

    def key(self, part: int, row: int) -> str:
        """Return the hash of the position in the table."""
        return hash_text(str(part), str(row))

    def repeats(self, part: int, row: int) -> int:
        """Return 1: a table has no repeats."""
        del part, row
        return 1

    def name(self, index: int, part: int, row: int) -> str:
        """Return the number of the row."""
        del part, row
        return f"row {index}"


def read_captions(value: object, row: str, needed: bool) -> tuple[str, ...]:
    """Return the captions of a row: a text (as bytes: in UTF-8), or a list of texts.

    Args:
        value: the cell.
        row: the name under which a user finds the row.
        needed: refuse a row without captions; otherwise it has none.

    Raises:
        DataError: it is needed and not a text.
    """
    values = value if isinstance(value, (list, tuple)) else [value]
    captions = [_as_text(each) for each in values if each is not None]
    found = tuple(each for each in captions if each is not None)
    if needed and (not found or len(found) < len(captions)):
        raise DataError(
            f"dataset.columns.caption: {row} has {_shorten(value)}, which is not a text; correct this row, or name a "
            "column that holds texts"
        )
    return found


def check_single(cell: object, field: str, column: str, row: str) -> None:
    """Refuse a cell that holds a list of images.

    Raises:
        DataError: with the remedy.
    """
    if isinstance(cell, (list, tuple)):
        raise DataError(lists_of_images(field, column, row))


def lists_of_images(field: str, column: str, where: str) -> str:
    """Return the message for a column whose cells hold lists of images."""
    return (
        f"dataset.columns.{field}: the column {column!r} of {where} holds lists of images; name a column with one "
        "image in each row, or write the data set with one row for each image"
    )


def _as_text(value: object) -> str | None:
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return value.decode()
    return value if isinstance(value, str) else None


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."


def open_image(cell: object, field: str, column: str, row: str) -> IO[bytes]:
    """Open the image file that a cell contains or names.

    Args:
        cell: an image as the `datasets` library represents it: its bytes, its path, or both.
        field: the field below `dataset.columns` that names the column.
        column: the name of the column.
        row: the name under which a user finds the row.

    Raises:
        DataError: the cell has no image.
    """
    if isinstance(cell, bytes):
        return io.BytesIO(cell)
    if isinstance(cell, str):
        cell = {"path": cell}
    if isinstance(cell, Mapping) and cell.get("bytes"):
        return io.BytesIO(cell["bytes"])
    if isinstance(cell, Mapping) and cell.get("path") and Path(cell["path"]).is_file():
        return Path(cell["path"]).open("rb")
    raise DataError(
        f"dataset.columns.{field}: {row} has no image in column {column!r}; name a column that holds images"
    )


@contextlib.contextmanager
def table_errors(what: str) -> Iterator[None]:
    """Translate the errors of reading a table within this block.

    Raises:
        DataError: the table is damaged or missing.
        StorageError: reading may succeed later.
    """
    try:
        yield
    except (RankError, GeneratorExit):
        raise
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise DataError(
            f"dataset.source: {what} cannot be read: {summarize(error)}; replace it with a valid file"
        ) from error
    except Exception as error:
        # Each client library raises its own exceptions when a connection breaks.
        raise StorageError(f"dataset.source: {what} cannot be read now: {summarize(error)}") from error


def summarize(error: Exception) -> str:
    """Return the text of an error in one line, or the name of its class if it has no text."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _read_cell(cell: object, field: str, column: str, row: str) -> bytes:
    """Read the bytes of an image that a cell contains or names by a path or URL."""
    path = cell.get("path") if isinstance(cell, Mapping) and not cell.get("bytes") else None
    if isinstance(path, str) and "://" in path:
        import fsspec  # noqa: PLC0415  few tables need it

        with table_errors(path), fsspec.open(path, "rb") as remote:
            return bytes(remote.read())
    with open_image(cell, field, column, row) as file:
        return file.read()
