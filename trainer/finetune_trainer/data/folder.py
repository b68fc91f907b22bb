"""Samples that lie in a folder: named by a metadata.jsonl or another .jsonl file, or just images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from finetune_contract.spec import Columns, DatasetSpec
from finetune_trainer.errors import DataError

METADATA = "metadata.jsonl"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_FILE_NAME = "file_name"


@dataclass(frozen=True)
class Row:
    """One sample: files below the folder, and the caption."""

    image: str
    caption: str = ""
    conditioning: str | None = None


class FolderSource:
    """Samples of a folder, in the order of its metadata, or else of the files' names."""

    def __init__(self, folder: Path, rows: Sequence[Row]) -> None:
        self._folder = folder
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def caption(self, index: int) -> str:
        """Caption of a sample; empty where there is no metadata."""
        return self._rows[index].caption

    def open(self, index: int) -> IO[bytes]:
        """The image file.

        Raises:
            DataError: it cannot be read.
        """
        return _open(self.file(index), "image")

    def open_conditioning(self, index: int) -> IO[bytes]:
        """The conditioning image's file.

        Raises:
            DataError: it cannot be read.
        """
        name = self._rows[index].conditioning
        assert name is not None
        return _open(self._folder / name, "conditioning image")

    def name(self, index: int) -> str:
        """Path of the image file."""
        return str(self.file(index))

    def file(self, index: int) -> Path:
        """The image file."""
        return self._folder / self._rows[index].image


def _open(path: Path, what: str) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"dataset.source: {what} {path} cannot be read: {error.strerror}") from error


def open_folder(
    folder: Path, spec: DatasetSpec, split: str, max_samples: int | None, needs_captions: bool
) -> FolderSource:
    """Open one split of a folder.

    Args:
        folder: what the manifest names.
        spec: the manifest's data set.
        split: name of the split.
        max_samples: open only the first so many.
        needs_captions: refuse a folder of bare images.

    Raises:
        DataError: it has no such split or column.
    """
    metadata = find_metadata(folder, split)
    if metadata is not None:
        return open_jsonl(metadata, spec, max_samples)
    if needs_captions or spec.columns.conditioning is not None:
        raise DataError(f"dataset.source: {folder} holds neither {METADATA} nor {split}/{METADATA}; write one")
    place = folder / split if (folder / split).is_dir() else folder
    files = sorted(path.name for path in place.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    return FolderSource(place, [Row(name) for name in files[:max_samples]])


def find_metadata(folder: Path, split: str) -> Path | None:
    """The metadata.jsonl of a split: below the split's own folder, or for a data set without splits at the top.

    Raises:
        DataError: other splits have one.
    """
    own = folder / split / METADATA
    if own.is_file():
        return own
    splits = sorted(entry.parent.name for entry in folder.glob(f"*/{METADATA}"))
    if splits:
        raise DataError(f"dataset.split: {folder} has no split {split!r}; it has {', '.join(splits)}")
    return folder / METADATA if (folder / METADATA).is_file() else None


def open_jsonl(file: Path, spec: DatasetSpec, max_samples: int | None) -> FolderSource:
    """Samples of a .jsonl file, one JSON object a line; its paths start from the file's folder.

    Raises:
        DataError: it cannot be read, or a line lacks a column.
    """
    rows: list[Row] = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"dataset.source: {file} cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        if max_samples is not None and len(rows) == max_samples:
            break
        if line.strip():
            rows.append(_parse_row(line, f"{file}:{number}", spec))
    return FolderSource(file.parent, rows)


def _parse_row(line: str, where: str, spec: DatasetSpec) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"dataset.source: {where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"dataset.source: {where} is not a JSON object")
    # What the `datasets` library calls the column of a folder, unless the manifest names another.
    is_default = spec.columns.image == Columns().image and spec.columns.image not in row
    image = _cell(row, "image", _FILE_NAME if is_default else spec.columns.image, where)
    caption = _cell(row, "caption", spec.columns.caption, where)
    if spec.columns.conditioning is None:
        return Row(image, caption)
    return Row(image, caption, _cell(row, "conditioning", spec.columns.conditioning, where))


def _cell(row: Mapping[str, Any], field: str, column: str, where: str) -> str:
    if column not in row:
        raise DataError(no_column(field, column, row, where))
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"dataset.columns.{field}: column {column!r} in {where} holds {value!r}, not a text")
    return value


def no_column(field: str, column: str, columns: Sequence[str] | Mapping[str, Any], where: str) -> str:
    """The sentence for a column that is not there."""
    names = ", ".join(sorted(columns)) or "none"
    return f"dataset.columns.{field}: there is no column {column!r} in {where}; the columns are {names}"
