"""Samples that lie in a folder: named by a metadata.jsonl or another .jsonl file, or just images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from finetune_contract.spec import Columns, DatasetSpec
from finetune_trainer.data.sources.filesystems import Folder, Place
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
    below, rows = read_folder(Folder(folder), spec, split, max_samples, needs_captions)
    return FolderSource(folder / below, rows)


def read_folder(
    place: Place, spec: DatasetSpec, split: str, max_samples: int | None, needs_captions: bool
) -> tuple[str, list[Row]]:
    """The samples of one split of a folder, wherever it lies; see `open_folder`.

    Returns:
        The folder below it that the samples' paths start from, empty for itself, and the samples.

    Raises:
        DataError: it has no such split or column.
    """
    metadata = find_metadata(place, split)
    if metadata is not None:
        return metadata.rpartition("/")[0], read_jsonl(place, metadata, spec, max_samples)
    if needs_captions or spec.columns.conditioning is not None:
        raise DataError(f"dataset.source: {place.url} holds neither {METADATA} nor {split}/{METADATA}; write one")
    below = split if place.files_in(split) else ""
    files = [name for name in place.files_in(below) if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES]
    return below, [Row(name) for name in files[:max_samples]]


def find_metadata(place: Place, split: str) -> str | None:
    """The metadata.jsonl of a split: below the split's own folder, or for a data set without splits at the top.

    Raises:
        DataError: other splits have one.
    """
    own = f"{split}/{METADATA}"
    if place.stamp(own) is not None:
        return own
    splits = place.folders_with(METADATA)
    if splits:
        raise DataError(f"dataset.split: {place.url} has no split {split!r}; it has {', '.join(splits)}")
    return METADATA if place.stamp(METADATA) is not None else None


def open_jsonl(file: Path, spec: DatasetSpec, max_samples: int | None) -> FolderSource:
    """Samples of a .jsonl file, one JSON object a line; its paths start from the file's folder.

    Raises:
        DataError: it cannot be read, or a line lacks a column.
    """
    return FolderSource(file.parent, read_jsonl(Folder(file.parent), file.name, spec, max_samples))


def read_jsonl(place: Place, name: str, spec: DatasetSpec, max_samples: int | None) -> list[Row]:
    """The samples of a .jsonl file; see `open_jsonl`.

    Raises:
        DataError: it cannot be read, or a line lacks a column.
    """
    rows: list[Row] = []
    try:
        text = place.read(name).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"dataset.source: {place.url}/{name} is no UTF-8: {error}") from error
    # Not splitlines: JSON may hold what Unicode calls the end of a line.
    for number, line in enumerate(text.split("\n"), start=1):
        if max_samples is not None and len(rows) == max_samples:
            break
        if line.strip():
            rows.append(_parse_row(line, f"{place.url}/{name}:{number}", spec))
    return rows


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
