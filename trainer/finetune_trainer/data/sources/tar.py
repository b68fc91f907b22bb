"""Streams .tar files of an object store, in the layout of WebDataset. The layout of tables uses it.

The files of a sample follow each other and have the same name up to its first dot; the rest of the name is the column.
"""

from __future__ import annotations

import contextlib
import tarfile
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from typing import BinaryIO

from finetune_trainer.data.sources.stream import StreamedRow
from finetune_trainer.data.sources.table_cells import TableColumns, TableFile, TableStream, table_errors
from finetune_trainer.errors import DataError


class TarStream(TableStream):
    """Rows of .tar files; see `Stream`. A part is a file.

    Args:
        files: the files, in order.
        columns: the columns to read.
    """

    def __init__(self, files: Sequence[TableFile], columns: TableColumns) -> None:
        super().__init__(columns.hash_files("tar", [(file.url, file.stamp) for file in files]))
        self._files = files
        self._columns = columns

    def num_parts(self) -> int:
        """Return the number of files."""
        return len(self._files)

    def num_rows(self, part: int) -> None:
        """Return None: the number is unknown before the part is read."""
        del part

    def read(self, part: int, first: int) -> Iterator[StreamedRow]:
        """Read the rows of a file, starting at row `first`; the rows before it are read and skipped.

        Raises:
            DataError: the file is damaged, or a row lacks a column.
            StorageError: it cannot be read now.
        """
        file = self._files[part]
        with table_errors(file.url), file.open() as opened, _tar_errors(file.url):
            for number, (name, cells) in enumerate(islice(_read_samples(opened), first, None), start=first):
                yield self._columns.make_row(number, cells, f"{name} in {file.url}")


def _read_samples(opened: BinaryIO) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the name of each sample, and its files by column."""
    with tarfile.open(fileobj=opened, mode="r|") as archive:
        members = ((_split_name(member.name), member) for member in archive if member.isfile())
        for name, group in groupby(members, key=lambda found: found[0][0]):
            cells = {}
            for (_, column), member in group:
                content = archive.extractfile(member)
                assert content is not None
                cells[column] = content.read()
            yield name, cells


def _split_name(path: str) -> tuple[str, str]:
    """Return the name of a sample, with its folder, and the column."""
    folder, slash, name = path.rpartition("/")
    stem, _, column = name.partition(".")
    return f"{folder}{slash}{stem}", column.lower()


@contextlib.contextmanager
def _tar_errors(url: str) -> Iterator[None]:
    try:
        yield
    except tarfile.TarError as error:
        raise DataError(f"dataset.source: {url} cannot be read: {error}; replace it with a complete file") from error
