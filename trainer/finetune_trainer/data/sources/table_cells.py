"""What lies in the cells of a table: captions, and images within the cell or named by it."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from finetune_contract.spec import Columns
from finetune_trainer.data.sources.folder import no_column
from finetune_trainer.errors import DataError


def read_caption(value: object, row: str) -> str:
    """The caption of a row; the first where it holds several.

    Raises:
        DataError: it is no text.
    """
    first = value[0] if isinstance(value, list) and value else value
    if not isinstance(first, str):
        raise DataError(f"dataset.columns.caption: {row} holds {value!r}, not a text")
    return first


def open_image(cell: object, field: str, column: str, row: str) -> IO[bytes]:
    """The image file within a cell, or that it names.

    Args:
        cell: what the `datasets` library makes of an image: its bytes, its path, or both.
        field: which of the manifest's columns it is.
        column: that column's name.
        row: how a person finds it.

    Raises:
        DataError: the cell holds none.
    """
    if isinstance(cell, bytes):
        return io.BytesIO(cell)
    if isinstance(cell, str):
        cell = {"path": cell}
    if isinstance(cell, Mapping) and cell.get("bytes"):
        return io.BytesIO(cell["bytes"])
    if isinstance(cell, Mapping) and cell.get("path") and Path(cell["path"]).is_file():
        return Path(cell["path"]).open("rb")
    raise DataError(f"dataset.columns.{field}: {row} holds no image in column {column!r}")


def image_columns(columns: Columns) -> dict[str, str]:
    """Names of the columns that hold images, by field."""
    found = {"image": columns.image}
    return found if columns.conditioning is None else {**found, "conditioning": columns.conditioning}


def check_columns(columns: Columns, there: Iterable[Any], needs_captions: bool, where: str) -> None:
    """Refuse a table that lacks a column.

    Raises:
        DataError: naming the field and the columns that there are.
    """
    names = [str(name) for name in there]
    wanted = image_columns(columns) | ({"caption": columns.caption} if needs_captions else {})
    for field, column in wanted.items():
        if column not in names:
            raise DataError(no_column(field, column, names, where))
