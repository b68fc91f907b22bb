"""Reads files that list the samples of a folder of images: .jsonl, .csv and .parquet. The layout of folders uses it.

Each row names an image, relative to the folder of the file, with its captions and its conditioning image.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from finetune_contract.image_folder import FILE_NAME, decode_text, read_csv
from finetune_contract.input_spec import Columns
from finetune_trainer.data.sources.base import missing_column
from finetune_trainer.data.sources.filesystems import Filesystem
from finetune_trainer.data.sources.layout import SplitRequest
from finetune_trainer.data.sources.table_cells import read_captions, table_errors
from finetune_trainer.errors import DataError

Row = tuple[str, Mapping[str, Any]]
"""The place of a row, for messages, and its cells by column."""


@dataclass(frozen=True)
class SampleRow:
    """One sample: names of files, relative to the folder of the list.

    Attributes:
        image: the image file.
        captions: its captions; empty if there are none.
        conditioning: the file of its conditioning image.
        repeats: number of times that each epoch uses it.
    """

    image: str
    captions: tuple[str, ...] = ()
    conditioning: str | None = None
    repeats: int = 1


def read_list(folder: Filesystem, name: str, request: SplitRequest) -> list[SampleRow]:
    """Read the samples that a file lists.

    Raises:
        DataError: it cannot be read, or a row lacks a column.
        StorageError: it cannot be read now.
    """
    suffix = name.rpartition(".")[2]
    where = f"{folder.url}/{name}"
    rows: list[SampleRow] = []
    for place, cells in _READERS[suffix](folder.read(name), where):
        if request.max_samples is not None and len(rows) == request.max_samples:
            break
        rows.append(_parse_row(cells, place, request))
    return rows


def _jsonl_rows(data: bytes, where: str) -> Iterator[Row]:
    # Not splitlines: JSON strings may contain other characters that Unicode treats as line ends.
    for number, line in enumerate(_decode(data, where).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{where}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"dataset.source: {place} is not valid JSON: {error}; correct this line") from error
        if not isinstance(row, dict):
            raise DataError(
                f"dataset.source: {place} is not a JSON object; write one object with a key for each column"
            )
        yield place, row


def _csv_rows(data: bytes, where: str) -> Iterator[Row]:
    try:
        for line, cells in read_csv(_decode(data, where)):
            yield f"{where}:{line}", cells
    except ValueError as error:
        raise DataError(f"dataset.source: {where}: {error}") from error


def _parquet_rows(data: bytes, where: str) -> Iterator[Row]:
    from pyarrow import parquet  # noqa: PLC0415  slow to import, and few folders need it

    with table_errors(where):
        rows = parquet.read_table(io.BytesIO(data)).to_pylist()
    for number, row in enumerate(rows):
        yield f"row {number} of {where}", row


_READERS = {"jsonl": _jsonl_rows, "csv": _csv_rows, "parquet": _parquet_rows}


def _decode(data: bytes, where: str) -> str:
    try:
        return decode_text(data)
    except ValueError as error:
        raise DataError(f"dataset.source: {where} is not valid UTF-8: {error}; save it in this encoding") from error


def _parse_row(row: Mapping[str, Any], where: str, request: SplitRequest) -> SampleRow:
    columns = request.dataset.columns
    # The `datasets` library uses this column name for folders. It applies unless the manifest names another column.
    is_default = columns.image == Columns().image and columns.image not in row
    image = _read_name(row, "image", FILE_NAME if is_default else columns.image, where)
    captions = _read_captions(row, columns.caption, where, request.needs_captions)
    if columns.conditioning is None:
        return SampleRow(image, captions)
    return SampleRow(image, captions, _read_name(row, "conditioning", columns.conditioning, where))


def _read_captions(row: Mapping[str, Any], column: str, where: str, needs_captions: bool) -> tuple[str, ...]:
    if column not in row and needs_captions:
        raise DataError(missing_column("caption", column, row, where))
    return read_captions(row.get(column), where, needs_captions)


def _read_name(row: Mapping[str, Any], field: str, column: str, where: str) -> str:
    if column not in row:
        raise DataError(missing_column(field, column, row, where))
    value = row[column]
    if not isinstance(value, str) or not value:
        raise DataError(
            f"dataset.columns.{field}: column {column!r} in {where} is {value!r}, which is not the name of a file; "
            "correct this line, or name another column"
        )
    return value
