"""Reads the cells of a table: captions, and images that are stored in a cell or named by it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from finetune_contract.input_spec import Columns
from finetune_trainer.data.hashes import hash_text
from finetune_trainer.data.sources.base import missing_column
from finetune_trainer.data.sources.stream import ImageReader, StreamedRow
from finetune_trainer.errors import DataError, RankError, StorageError


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
        has_caption = self.needs_captions or self.columns.caption in cells
        caption = read_caption(cells.get(self.columns.caption), name) if has_caption else ""
        return StreamedRow(number, caption, readers["image"], readers.get("conditioning"))

    def hash_files(self, kind: str, files: Sequence[tuple[str, str]]) -> str:
        """Return the identity of a stream over files, given as pairs of URL and stamp."""
        columns = [self.columns.image, self.columns.caption, self.columns.conditioning or ""]
        return hash_text(kind, *columns, *(part for file in files for part in file))

    def _reader(self, cells: Mapping[str, Any], field: str, column: str, name: str) -> ImageReader:
        if column not in cells:
            raise DataError(missing_column(field, column, cells, self.source))
        return partial(_read_cell, cells[column], field, column, name)


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

    def name(self, index: int, part: int, row: int) -> str:
        """Return the number of the row."""
        del part, row
        return f"row {index}"


def read_caption(value: object, row: str) -> str:
    """Return the caption of a row; the first one if the row has a list of captions.

    Raises:
        DataError: it is not a text.
    """
    first = value[0] if isinstance(value, list) and value else value
    if not isinstance(first, str):
        raise DataError(
            f"dataset.columns.caption: {row} has {value!r}, which is not a text; name a column that holds texts"
        )
    return first


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
