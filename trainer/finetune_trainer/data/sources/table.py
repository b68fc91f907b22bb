"""Samples of a table that the `datasets` library loads: .parquet and .tar files, or a data set of the hub."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from finetune_contract.bucket import is_bucket_url
from finetune_contract.spec import DatasetSpec
from finetune_trainer.data.sources.filesystems import Place
from finetune_trainer.data.sources.folder import METADATA
from finetune_trainer.data.sources.table_cells import check_columns, image_columns, open_image, read_caption
from finetune_trainer.errors import DataError, RankError

PARQUET, TAR = ".parquet", ".tar"
TABLES = (PARQUET, TAR)
"""Ends of the names of files that hold many samples; a .tar is laid out as WebDataset's are."""
JSONL = ".jsonl"
SINGLE_FILES = (JSONL, *TABLES)
"""Ends of the names of files that are a data set by themselves."""
_SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation")
"""Names by which the files of splits are known."""


class TableSource:
    """Samples of a table whose image columns hold undecoded files."""

    def __init__(self, table: Any, spec: DatasetSpec, has_captions: bool) -> None:
        self._table = table
        self._columns = spec.columns
        # A column by itself: a row would be read with its image.
        self._captions = table[spec.columns.caption] if has_captions else None

    def __len__(self) -> int:
        return len(self._table)

    def caption(self, index: int) -> str:
        """Caption of a sample; the first where a row holds several, empty where there is no such column.

        Raises:
            DataError: it is no text.
        """
        return "" if self._captions is None else read_caption(self._captions[index], self.name(index))

    def open(self, index: int) -> IO[bytes]:
        """The image file within the row, or that the row names.

        Raises:
            DataError: the row holds none.
        """
        return self._open(index, "image", self._columns.image)

    def open_conditioning(self, index: int) -> IO[bytes]:
        """The conditioning image within the row, or that the row names.

        Raises:
            DataError: the row holds none.
        """
        assert self._columns.conditioning is not None
        return self._open(index, "conditioning", self._columns.conditioning)

    def name(self, index: int) -> str:
        """Number of the row."""
        return f"row {index}"

    def file(self, index: int) -> Path | None:
        """None: images lie within rows."""
        del index
        return None

    def _open(self, index: int, field: str, column: str) -> IO[bytes]:
        return open_image(self._table[index][column], field, column, self.name(index))


def open_table(spec: DatasetSpec, split: str, max_samples: int | None, needs_captions: bool) -> TableSource:
    """Open one split of a .parquet or .tar file, of a folder of these, or of a hub data set.

    Raises:
        DataError: it cannot be loaded, or has no such split or column.
    """
    import datasets  # noqa: PLC0415  seconds to import, and folders do not need it

    with loading(spec.source, split):
        if spec.source.endswith(TABLES):
            kind = "parquet" if spec.source.endswith(PARQUET) else "webdataset"
            table = datasets.load_dataset(kind, data_files={split: spec.source}, split=split)
        else:
            table = datasets.load_dataset(spec.source, split=split)
    check_columns(spec.columns, table.column_names, needs_captions, spec.source)
    if max_samples is not None:
        table = table.select(range(min(max_samples, len(table))))
    for column in image_columns(spec.columns).values():
        table = table.cast_column(column, datasets.Image(decode=False))
    return TableSource(table, spec, spec.columns.caption in table.column_names)


@contextlib.contextmanager
def loading(source: str, split: str) -> Iterator[None]:
    """Within this block the `datasets` library opens a data set; what is wrong with it becomes a DataError."""
    try:
        yield
    except RankError:
        raise
    except Exception as error:
        # The library raises dozens of kinds, and whatever it is, this data set cannot be used.
        summary = " ".join(str(error).split())[:300]
        if "scripts are no longer supported" in summary:
            raise DataError(
                f"dataset.source: {source} is a script, which the datasets library no longer runs; convert it to "
                "parquet once with an older release, or write a data set of parquet files or a folder of images"
            ) from error
        raise DataError(f"dataset.source: cannot load split {split!r} of {source}: {summary}") from error


def check_place(spec: DatasetSpec) -> None:
    """Refuse a path of this machine where nothing is.

    Raises:
        DataError: naming it.
    """
    is_path = spec.source.startswith(("/", "./", "../", "~"))
    if is_path and not is_bucket_url(spec.source) and not Path(spec.source).exists():
        raise DataError(
            f"dataset.source: there is no folder or file {spec.source}; write one that the job's pods can see"
        )


def holds_tables(place: Place) -> bool:
    """Whether a folder is one of tables, not of images with their metadata."""
    if place.stamp(METADATA) is not None or place.folders_with(METADATA):
        return False
    return any(name.endswith(TABLES) for name in place.names())


def tables_of_split(place: Place, split: str) -> list[str]:
    """Names of the tables of a split, in order: by the folder or by the beginning of the file's name.

    Raises:
        DataError: there are tables of other splits only.
    """
    tables = [name for name in place.names() if name.endswith(TABLES)]
    kind = PARQUET if any(name.endswith(PARQUET) for name in tables) else TAR
    tables = [name for name in tables if name.endswith(kind)]
    own = [name for name in tables if _is_of(name, split)]
    others = [other for other in _SPLITS if any(_is_of(name, other) for name in tables)]
    if not own and others:
        raise DataError(f"dataset.split: {place.url} has no split {split!r}; it has {', '.join(others)}")
    return own or tables


def _is_of(name: str, split: str) -> bool:
    *folders, file = PurePosixPath(name).parts
    return split in folders or re.match(rf"{re.escape(split)}[-_.]", file) is not None
