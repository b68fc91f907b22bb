"""Streams .parquet files by row group. The layouts of tables and of the hub use it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune_trainer import patience
from finetune_trainer.data.sources.stream import StreamedRow
from finetune_trainer.data.sources.table_cells import TableColumns, TableFile, TableStream, table_errors
from finetune_trainer.errors import StorageError
from finetune_trainer.files import write_atomically

_BATCH_ROWS = 16
_NUM_READERS = 8
"""Footers that are read at the same time."""


class ParquetStream(TableStream):
    """Rows of .parquet files; see `Stream`. A part is a row group, which is in memory while its rows are read.

    Args:
        files: the files, in order.
        columns: the columns to read.
        notes: folder that keeps the row groups of the files between runs: each footer takes a request.

    Raises:
        DataError: a file is damaged, or lacks a column.
        StorageError: a file cannot be read now, or the notes cannot be written.
    """

    def __init__(self, files: Sequence[TableFile], columns: TableColumns, notes: Path) -> None:
        super().__init__(columns.hash_files("parquet", [(file.url, file.stamp) for file in files]))
        self._files = files
        self._columns = columns
        self._notes = notes
        columns.check(self._column_names)

    def num_parts(self) -> int:
        """Return the number of row groups."""
        return len(self._groups)

    def num_rows(self, part: int) -> int:
        """Return the number of rows of a row group."""
        return self._groups[part][2]

    def read(self, part: int, first: int) -> Iterator[StreamedRow]:
        """Read the rows of a row group, starting at row `first`.

        Raises:
            DataError: the file is damaged, or a caption is not a text.
            StorageError: it cannot be read now.
        """
        from pyarrow import parquet  # noqa: PLC0415  slow to import, and other layouts do not need it

        number, group, _ = self._groups[part]
        file = self._files[number]
        with table_errors(file.url), file.open() as opened:
            # Each column that is read takes one request, so there is nothing to buffer ahead.
            table = parquet.ParquetFile(opened, pre_buffer=False)
            names = self._columns.select(self._column_names)
            row = 0
            for batch in table.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group], columns=names):
                skipped = max(0, min(first - row, len(batch)))
                for offset, cells in enumerate(batch.slice(skipped).to_pylist(), start=row + skipped):
                    yield self._columns.make_row(offset, cells, f"row {offset} of row group {group} of {file.url}")
                row += len(batch)

    @cached_property
    def _footers(self) -> dict[str, Any]:
        """Columns, and numbers of rows of the row groups of each file; from the notes if they have them."""
        note = self._notes / f"{self.identity[:32]}.json"
        try:
            footers: dict[str, Any] = json.loads(note.read_bytes())
        except (OSError, ValueError):
            with ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="footers") as pool:
                found = list(pool.map(_read_footer_patiently, self._files))
            footers = {"columns": found[0][0], "rows": [rows for _, rows in found]}
            try:
                patience.wait_out("cache: writing", lambda: write_atomically(note, json.dumps(footers).encode()))
            except OSError as error:
                raise StorageError(f"cache: cannot write {note}: {error.strerror}") from error
        return footers

    @property
    def _column_names(self) -> list[str]:
        return list(self._footers["columns"])

    @cached_property
    def _groups(self) -> list[tuple[int, int, int]]:
        """Number of the file, number of the row group within it, and number of rows, of each part."""
        files = enumerate(self._footers["rows"])
        return [(file, group, rows) for file, groups in files for group, rows in enumerate(groups)]


def _read_footer_patiently(file: TableFile) -> tuple[list[str], list[int]]:
    return patience.wait_out(f"dataset.source: reading {file.url}", lambda: _read_footer(file))


def _read_footer(file: TableFile) -> tuple[list[str], list[int]]:
    from pyarrow import parquet  # noqa: PLC0415  slow to import, and other layouts do not need it

    with table_errors(file.url), file.open() as opened:
        table = parquet.ParquetFile(opened)
        groups = [table.metadata.row_group(number).num_rows for number in range(table.metadata.num_row_groups)]
        return list(table.schema_arrow.names), groups
