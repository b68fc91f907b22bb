"""Streaming tables: .parquet files, wherever they lie, and what else the `datasets` library can stream."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO

from finetune_contract.spec import Columns
from finetune_trainer.data.cache.hashes import hash_text
from finetune_trainer.data.sources.folder import no_column
from finetune_trainer.data.sources.stream import Reader, StreamedRow
from finetune_trainer.data.sources.table_cells import check_columns, image_columns, open_image, read_caption
from finetune_trainer.errors import DataError, RankError, StorageError
from finetune_trainer.files import write_aside

_BATCH_ROWS = 16
_AT_ONCE = 8


@dataclass(frozen=True)
class TableFile:
    """One file of a table.

    Attributes:
        url: where it lies.
        stamp: changes when its contents do.
        open: opens it, to jump in.
    """

    url: str
    stamp: str
    open: Callable[[], contextlib.AbstractContextManager[BinaryIO]]


@dataclass(frozen=True)
class Wanted:
    """What is taken of a table.

    Attributes:
        columns: the manifest's.
        needs_captions: whether there must be captions.
        source: the manifest's name of the data set.
    """

    columns: Columns
    needs_captions: bool
    source: str

    def check(self, there: Sequence[str]) -> None:
        """Refuse a table that lacks a column.

        Raises:
            DataError: naming it.
        """
        check_columns(self.columns, there, self.needs_captions, self.source)

    def names(self, there: Sequence[str]) -> list[str]:
        """The columns that are read."""
        caption = [self.columns.caption] if self.columns.caption in there else []
        return [*image_columns(self.columns).values(), *caption]

    def row(self, number: int, cells: Mapping[str, Any], name: str) -> StreamedRow:
        """A row, whose images are in memory already or are named.

        Raises:
            DataError: its caption is no text.
        """
        images = image_columns(self.columns)
        readers = {field: self._reader(cells, field, column, name) for field, column in images.items()}
        has_caption = self.needs_captions or self.columns.caption in cells
        caption = read_caption(cells.get(self.columns.caption), name) if has_caption else ""
        return StreamedRow(number, caption, readers["image"], readers.get("conditioning"))

    def hash(self, kind: str, files: Sequence[tuple[str, str]]) -> str:
        """Identity of a stream of these files and stamps."""
        columns = [self.columns.image, self.columns.caption, self.columns.conditioning or ""]
        return hash_text(kind, *columns, *(part for file in files for part in file))

    def _reader(self, cells: Mapping[str, Any], field: str, column: str, name: str) -> Reader:
        if column not in cells:
            raise DataError(no_column(field, column, cells, self.source))
        return partial(_read_cell, cells[column], field, column, name)


class _TableStream:
    """What streams of tables share: a row is remembered by its place in files that have not changed; see `Stream`.

    Args:
        identity: hash of the files' names and stamps, and of the columns.
    """

    def __init__(self, identity: str) -> None:
        self.identity = identity
        self.state = identity

    def key(self, part: int, row: int) -> str:
        """Hash of the place in the table."""
        return hash_text(str(part), str(row))


class ParquetStream(_TableStream):
    """.parquet files; see `Stream`. A part is a row group, which is in memory while its rows are read."""

    def __init__(self, files: Sequence[TableFile], wanted: Wanted, notes: Path) -> None:
        super().__init__(wanted.hash("parquet", [(file.url, file.stamp) for file in files]))
        self._files = files
        self._wanted = wanted
        self._notes = notes
        wanted.check(self._columns)

    def num_parts(self) -> int:
        """Number of row groups."""
        return len(self._groups)

    def num_rows(self, part: int) -> int:
        """Number of rows of a row group."""
        return self._groups[part][2]

    def read(self, part: int, first: int) -> Iterator[StreamedRow]:
        """The rows of a row group, from one of them on.

        Raises:
            DataError: the file is damaged, or a caption is no text.
            StorageError: it cannot be read now.
        """
        from pyarrow import parquet  # noqa: PLC0415  other data sets need not wait for it

        number, group, _ = self._groups[part]
        file = self._files[number]
        with telling(file.url), file.open() as opened:
            # Of the columns that are read, one request each: there is nothing to gain by reading ahead of them.
            table = parquet.ParquetFile(opened, pre_buffer=False)
            names = self._wanted.names(self._columns)
            row = 0
            for batch in table.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group], columns=names):
                skipped = max(0, min(first - row, len(batch)))
                for offset, cells in enumerate(batch.slice(skipped).to_pylist(), start=row + skipped):
                    yield self._wanted.row(offset, cells, f"row {offset} of row group {group} of {file.url}")
                row += len(batch)

    def name(self, index: int, part: int, row: int) -> str:
        """Number of the row."""
        del part, row
        return f"row {index}"

    @cached_property
    def _layout(self) -> dict[str, Any]:
        """Columns, and rows of each row group of each file: as noted, for many files take many requests."""
        note = self._notes / f"{self.identity[:32]}.json"
        try:
            known: dict[str, Any] = json.loads(note.read_bytes())
        except (OSError, ValueError):
            with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="footers") as pool:
                found = list(pool.map(_read_footer, self._files))
            known = {"columns": found[0][0], "rows": [rows for _, rows in found]}
            try:
                write_aside(note, json.dumps(known).encode())
            except OSError as error:
                raise StorageError(f"cache: cannot write {note}: {error.strerror}") from error
        return known

    @property
    def _columns(self) -> list[str]:
        return list(self._layout["columns"])

    @cached_property
    def _groups(self) -> list[tuple[int, int, int]]:
        """File, row group within it, and rows, of each part."""
        files = enumerate(self._layout["rows"])
        return [(file, group, rows) for file, groups in files for group, rows in enumerate(groups)]


class IterableStream(_TableStream):
    """What the `datasets` library streams (tars of WebDataset, image folders); see `Stream`. A part is a file."""

    def __init__(self, dataset: Any, files: Sequence[tuple[str, str]], wanted: Wanted) -> None:
        super().__init__(wanted.hash("iterable", files))
        self._dataset = dataset
        self._wanted = wanted
        if dataset.column_names is not None:
            wanted.check(dataset.column_names)

    def num_parts(self) -> int:
        """Number of files, or of what else the library can read by itself."""
        return int(self._dataset.num_shards)

    def num_rows(self, part: int) -> None:
        """None: only reading tells."""
        del part

    def read(self, part: int, first: int) -> Iterator[StreamedRow]:
        """The rows of a file, from one of them on; those before are read, and passed over.

        Raises:
            DataError: the file is damaged, or a row lacks a column.
            StorageError: it cannot be read now.
        """
        shard = self._dataset.shard(num_shards=self.num_parts(), index=part).skip(first)
        with telling(self._wanted.source):
            for row, cells in enumerate(shard, start=first):
                yield self._wanted.row(row, cells, f"row {row} of part {part}")

    def name(self, index: int, part: int, row: int) -> str:
        """Number of the row."""
        del part, row
        return f"row {index}"


@contextlib.contextmanager
def telling(what: str) -> Iterator[None]:
    """Within this block a table is read; what goes wrong becomes a DataError, or a StorageError where it may pass."""
    try:
        yield
    except (RankError, GeneratorExit):
        raise
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise DataError(f"dataset.source: {what} cannot be read: {_summary(error)}") from error
    except Exception as error:
        # Each client raises kinds of its own when a connection breaks.
        raise StorageError(f"dataset.source: {what} cannot be read now: {_summary(error)}") from error


def _read_footer(file: TableFile) -> tuple[list[str], list[int]]:
    from pyarrow import parquet  # noqa: PLC0415  other data sets need not wait for it

    with telling(file.url), file.open() as opened:
        table = parquet.ParquetFile(opened)
        groups = [table.metadata.row_group(number).num_rows for number in range(table.metadata.num_row_groups)]
        return list(table.schema_arrow.names), groups


def _read_cell(cell: object, field: str, column: str, row: str) -> bytes:
    """The bytes of an image that a cell holds, or that it names, be it by a URL."""
    path = cell.get("path") if isinstance(cell, Mapping) and not cell.get("bytes") else None
    if isinstance(path, str) and "://" in path:
        import fsspec  # noqa: PLC0415  seldom needed

        with telling(path), fsspec.open(path, "rb") as remote:
            return bytes(remote.read())
    with open_image(cell, field, column, row) as file:
        return file.read()


def _summary(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
