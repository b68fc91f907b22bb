"""Samples of a table that the `datasets` library loads: a .parquet file, or a data set of the hub."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from finetune_contract.spec import DatasetSpec
from finetune_trainer.data.folder import no_column
from finetune_trainer.errors import DataError


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
        if self._captions is None:
            return ""
        value = self._captions[index]
        first = value[0] if isinstance(value, list) and value else value
        if not isinstance(first, str):
            raise DataError(f"dataset.columns.caption: {self.name(index)} holds {value!r}, not a text")
        return first

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
        cell = self._table[index][column]
        if isinstance(cell, Mapping) and cell.get("bytes"):
            return io.BytesIO(cell["bytes"])
        if isinstance(cell, Mapping) and cell.get("path") and Path(cell["path"]).is_file():
            return Path(cell["path"]).open("rb")
        raise DataError(f"dataset.columns.{field}: {self.name(index)} holds no image in column {column!r}")


def open_table(spec: DatasetSpec, split: str, max_samples: int | None, needs_captions: bool) -> TableSource:
    """Open one split of a .parquet file or of a hub data set.

    Raises:
        DataError: it cannot be loaded, or has no such split or column.
    """
    import datasets  # noqa: PLC0415  seconds to import, and folders do not need it

    try:
        if spec.source.endswith(".parquet"):
            table = datasets.load_dataset("parquet", data_files={split: spec.source}, split=split)
        else:
            table = datasets.load_dataset(spec.source, split=split)
    except Exception as error:
        # The library raises dozens of kinds, and whatever it is, this data set cannot be used.
        summary = " ".join(str(error).split())[:300]
        raise DataError(f"dataset.source: cannot load split {split!r} of {spec.source}: {summary}") from error
    images = {"image": spec.columns.image, "conditioning": spec.columns.conditioning}
    wanted = images | ({"caption": spec.columns.caption} if needs_captions else {})
    for field, column in wanted.items():
        if column is not None and column not in table.column_names:
            raise DataError(no_column(field, column, table.column_names, spec.source))
    if max_samples is not None:
        table = table.select(range(min(max_samples, len(table))))
    for column in images.values():
        if column is not None:
            table = table.cast_column(column, datasets.Image(decode=False))
    return TableSource(table, spec, spec.columns.caption in table.column_names)
