"""The layout of data sets that the `datasets` library opens: by their name on the hub, or in a folder with its rules.

The layout of tables also uses the library, for the files that it names.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

from finetune_trainer import patience
from finetune_trainer.data.hashes import hash_text
from finetune_trainer.data.sources.filesystems import LocalFolder
from finetune_trainer.data.sources.layout import DatasetLayout, SplitRequest
from finetune_trainer.data.sources.parquet import ParquetStream
from finetune_trainer.data.sources.stream import Stream, StreamedRow
from finetune_trainer.data.sources.table_cells import (
    TableColumns,
    TableFile,
    TableStream,
    lists_of_images,
    open_image,
    read_captions,
    summarize,
    table_errors,
)
from finetune_trainer.errors import DataError, NetworkError, RankError

_LOG = logging.getLogger(__name__)

T = TypeVar("T")


class TableSource:
    """Samples of a table that the `datasets` library has loaded; see `SampleSource`.

    Args:
        table: the library's table; its image columns must contain files that are not decoded.
        columns: the columns to read.
    """

    def __init__(self, table: Any, columns: TableColumns) -> None:
        self._table = table
        self._columns = columns.columns
        self._needs_captions = columns.needs_captions
        # A separate column: to read a row also reads its image.
        self._captions = table[self._columns.caption] if self._columns.caption in table.column_names else None

    def __len__(self) -> int:
        return len(self._table)

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of a sample; empty if there is no such column.

        Raises:
            DataError: it needs captions, and has a value that is not a text.
        """
        value = None if self._captions is None else self._captions[index]
        return read_captions(value, self.name(index), self._needs_captions)

    def repeats(self, index: int) -> int:
        """Return 1: a table has no repeats."""
        del index
        return 1

    def open(self, index: int) -> IO[bytes]:
        """Open the image file that the row contains or names.

        Raises:
            DataError: the row has no image.
        """
        return self._open(index, "image", self._columns.image)

    def open_conditioning(self, index: int) -> IO[bytes]:
        """Open the conditioning image that the row contains or names.

        Raises:
            DataError: the row has no image.
        """
        assert self._columns.conditioning is not None
        return self._open(index, "conditioning", self._columns.conditioning)

    def name(self, index: int) -> str:
        """Return the number of the row."""
        return f"row {index}"

    def file(self, index: int) -> Path | None:
        """Return None: images are stored in rows."""
        del index
        return None

    def conditioning_file(self, index: int) -> Path | None:
        """Return None: a conditioning image is a cell of a table."""
        del index
        return None

    def _open(self, index: int, field: str, column: str) -> IO[bytes]:
        return open_image(self._table[index][column], field, column, self.name(index))


class LibraryStream(TableStream):
    """Rows that the `datasets` library streams (tar files of WebDataset, ...); see `Stream`. A part is a file.

    Args:
        dataset: the library's iterable data set.
        files: URL and stamp of each file.
        columns: the columns to read.

    Raises:
        DataError: a column is missing.
    """

    def __init__(self, dataset: Any, files: Sequence[tuple[str, str]], columns: TableColumns) -> None:
        super().__init__(columns.hash_files("iterable", files))
        self._dataset = dataset
        self._columns = columns
        if dataset.column_names is not None:
            columns.check(dataset.column_names)

    def num_parts(self) -> int:
        """Return the number of files, or of other units that the library can read separately."""
        return int(self._dataset.num_shards)

    def num_rows(self, part: int) -> None:
        """Return None: the number is unknown before the part is read."""
        del part

    def read(self, part: int, first: int) -> Iterator[StreamedRow]:
        """Read the rows of a file, starting at row `first`; the rows before it are read and skipped.

        Raises:
            DataError: the file is damaged, or a row lacks a column.
            StorageError: it cannot be read now.
        """
        shard = self._dataset.shard(num_shards=self.num_parts(), index=part).skip(first)
        with table_errors(self._columns.source):
            for row, cells in enumerate(shard, start=first):
                yield self._columns.make_row(row, cells, f"row {row} of part {part}")


def load_split(request: SplitRequest, builder: str | None = None) -> TableSource:
    """Load one split with the `datasets` library.

    Args:
        request: the split.
        builder: the library's builder for a source that is a single file; None if the library recognises the source.

    Raises:
        DataError: it cannot be loaded, or lacks the split or a column.
    """
    import datasets  # noqa: PLC0415  takes seconds, and folders do not need it

    with _loading_errors(request):
        options: dict[str, Any] = {"revision": request.dataset.revision}
        if builder is not None:
            options = {"data_files": {request.split: request.source}}
        name = builder or request.source
        table = _wait_out(request, lambda: datasets.load_dataset(name, split=request.split, **options))
    columns = columns_of(request)
    columns.check(table.column_names)
    if request.max_samples is not None:
        table = table.select(range(min(request.max_samples, len(table))))
    for field, column in columns.images.items():
        table = _cast_images(table, field, column, request)
    return TableSource(table, columns)


def stream_split(
    request: SplitRequest, notes: Path, path: str | None = None, data_files: Mapping[str, Sequence[str]] | None = None
) -> Stream:
    """Open one split as a stream with the `datasets` library.

    Args:
        request: the split.
        notes: folder that keeps the row groups of .parquet files between runs.
        path: what the library opens, or its builder for `data_files`; None for the source.
        data_files: URLs of the files of each split; None if the library finds them.

    Raises:
        DataError: it cannot be loaded, or lacks the split or a column.
        StorageError: it cannot be read now.
    """
    import datasets  # noqa: PLC0415  takes seconds, and folders do not need it

    columns = columns_of(request)
    with _loading_errors(request):
        revision = request.dataset.revision if path is None else None
        name = path or request.source
        builder = _wait_out(
            request, lambda: datasets.load_dataset_builder(name, data_files=data_files, revision=revision)
        )
        by_split: Mapping[str, Any] = builder.config.data_files or {}
        found = by_split.get(request.split)
        if found is None:
            splits = ", ".join(map(str, by_split))
            raise ValueError(f"write a split that it has: {splits}" if splits else "it has no files")
        stamp = hash_text(*map(str, found.origin_metadata))
        files = [(str(url), stamp) for url in found]
        if type(builder).__name__ != "Parquet":
            dataset = builder.as_streaming_dataset(split=request.split)
            for field, column in columns.images.items():
                if column in (dataset.column_names or [column]):
                    dataset = _cast_images(dataset, field, column, request)
            return LibraryStream(dataset, files, columns)
    return ParquetStream([TableFile(url, stamp, partial(_open_url, url)) for url, stamp in files], columns, notes)


def _cast_images(table: Any, field: str, column: str, request: SplitRequest) -> Any:
    """Return a table whose column holds files of images that are not decoded.

    Raises:
        DataError: the column holds something else.
    """
    import datasets  # noqa: PLC0415  takes seconds, and folders do not need it

    kind = (table.features or {}).get(column)
    if isinstance(kind, (list, datasets.List, datasets.LargeList)):
        raise DataError(lists_of_images(field, column, request.source))
    try:
        return table.cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise DataError(
            f"dataset.columns.{field}: the column {column!r} of {request.source} holds no images ({kind}); name a "
            "column that holds images"
        ) from error


def find_commit(source: str, revision: str | None) -> str | None:
    """Return the commit of a data set on the hub; None if it cannot be found out, e.g. offline.

    Args:
        source: its name.
        revision: branch, tag or commit; None for the main branch.

    Raises:
        NetworkError: the hub does not answer.
    """
    from huggingface_hub import HfApi  # noqa: PLC0415  only hub ids need it

    try:
        return patience.wait_out(
            f"finding the commit of {source}", lambda: HfApi().dataset_info(source, revision=revision).sha
        )
    except NetworkError:
        raise
    except Exception:
        # What is wrong with the name or the revision is reported when the data set is loaded.
        _LOG.info("the commit of %s is unknown", source, exc_info=True)
        return None


def columns_of(request: SplitRequest) -> TableColumns:
    """Return the columns to read for a request."""
    return TableColumns(request.dataset.columns, request.needs_captions, request.source)


def _wait_out(request: SplitRequest, load: Callable[[], T]) -> T:
    return patience.wait_out(f"dataset.source: loading split {request.split!r} of {request.source}", load)


@contextlib.contextmanager
def _loading_errors(request: SplitRequest) -> Iterator[None]:
    """Translate the errors of the `datasets` library while it opens a data set.

    Raises:
        DataError: with the library's text.
    """
    try:
        yield
    except RankError:
        raise
    except Exception as error:
        # The library raises dozens of exception classes, and each of them means that this data set cannot be used.
        summary = summarize(error)
        if "scripts are no longer supported" in summary:
            raise DataError(
                f"dataset.source: {request.source} is a script, which the datasets library does not run; convert it to "
                "parquet with an older release of it, or write a data set of parquet files or a folder of images"
            ) from error
        raise DataError(
            f"dataset.source: cannot load split {request.split!r} of {request.source}: {summary}"
        ) from error


def _open_url(url: str) -> contextlib.AbstractContextManager[Any]:
    if "://" not in url:
        return LocalFolder(Path(url).parent).open(Path(url).name)
    import fsspec  # noqa: PLC0415  only files of the hub need it

    opened: contextlib.AbstractContextManager[Any] = fsspec.open(url, "rb")
    return opened


LAYOUT = DatasetLayout((), lambda _: False, load_split, stream_split)
"""A data set that the `datasets` library opens by its name."""
