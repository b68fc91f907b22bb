"""Where samples come from: a folder with metadata.jsonl, or a data set that the `datasets` library loads.

Opened once at the start. Whatever is wrong with it ends the rank with the sentence of a DataError.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from PIL import Image

from finetune_contract.spec import Columns, DatasetSpec
from finetune_trainer.data import images
from finetune_trainer.errors import DataError

METADATA = "metadata.jsonl"
_FILE_NAME = "file_name"


class Source(Protocol):
    """An indexed set of samples."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def caption(self, index: int) -> str:
        """Caption of a sample."""
        ...

    def open(self, index: int) -> IO[bytes]:
        """The encoded image (PNG, JPEG, ...) of a sample, as stored."""
        ...

    def name(self, index: int) -> str:
        """How a person finds the sample: its file, or its row."""
        ...


class FolderSource:
    """Samples of a metadata.jsonl, one JSON object a line, in the order of the file."""

    def __init__(self, folder: Path, rows: Sequence[tuple[str, str]]) -> None:
        self._folder = folder
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def caption(self, index: int) -> str:
        """Caption of a sample."""
        return self._rows[index][1]

    def open(self, index: int) -> IO[bytes]:
        """The image file.

        Raises:
            DataError: it cannot be read.
        """
        try:
            return (self._folder / self._rows[index][0]).open("rb")
        except OSError as error:
            raise DataError(f"dataset.source: image {self.name(index)} cannot be read: {error.strerror}") from error

    def name(self, index: int) -> str:
        """Path of the image file."""
        return str(self._folder / self._rows[index][0])


class TableSource:
    """Samples of a `datasets` table whose image column holds undecoded files."""

    def __init__(self, table: Any, image_column: str, caption_column: str) -> None:
        self._table = table
        self._image_column = image_column
        # A column by itself: a row would be read with its image.
        self._captions = table[caption_column]

    def __len__(self) -> int:
        return len(self._table)

    def caption(self, index: int) -> str:
        """Caption of a sample; the first where a row holds several.

        Raises:
            DataError: it is no text.
        """
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
        cell = self._table[index][self._image_column]
        if isinstance(cell, Mapping) and cell.get("bytes"):
            return io.BytesIO(cell["bytes"])
        if isinstance(cell, Mapping) and cell.get("path") and Path(cell["path"]).is_file():
            return Path(cell["path"]).open("rb")
        raise DataError(f"dataset.columns.image: {self.name(index)} holds no image in column {self._image_column!r}")

    def name(self, index: int) -> str:
        """Number of the row."""
        return f"row {index}"


def open_source(spec: DatasetSpec, split: str, max_samples: int | None = None) -> Source:
    """Open one split of a data set.

    Raises:
        DataError: it is not there, has no such split or column, or holds no sample.
    """
    path = Path(spec.source)
    if path.is_dir():
        metadata = find_metadata(path, split)
        source: Source = _open_folder(metadata, spec, max_samples)
    elif spec.source.startswith(("/", "./", "../", "~")):
        raise DataError(f"dataset.source: there is no folder {spec.source}; write one that the job's pods can see")
    else:
        source = _open_table(spec, split, max_samples)
    if len(source) == 0:
        raise DataError(f"dataset.source: split {split!r} of {spec.source} holds no samples")
    return source


def find_metadata(folder: Path, split: str) -> Path:
    """The metadata.jsonl of a split: below the split's own folder, or for a data set without splits at the top.

    Raises:
        DataError: there is none.
    """
    own = folder / split / METADATA
    if own.is_file():
        return own
    splits = sorted(entry.parent.name for entry in folder.glob(f"*/{METADATA}"))
    if splits:
        raise DataError(f"dataset.split: {folder} has no split {split!r}; it has {', '.join(splits)}")
    if not (folder / METADATA).is_file():
        raise DataError(f"dataset.source: {folder} holds neither {METADATA} nor {split}/{METADATA}; write one")
    return folder / METADATA


def _open_folder(metadata: Path, spec: DatasetSpec, max_samples: int | None) -> FolderSource:
    rows: list[tuple[str, str]] = []
    try:
        lines = metadata.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"dataset.source: {metadata} cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        if max_samples is not None and len(rows) == max_samples:
            break
        if line.strip():
            rows.append(_parse_row(line, f"{metadata}:{number}", spec))
    return FolderSource(metadata.parent, rows)


def _parse_row(line: str, where: str, spec: DatasetSpec) -> tuple[str, str]:
    """File name and caption of one line."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"dataset.source: {where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"dataset.source: {where} is not a JSON object")
    # What the `datasets` library calls the column of a folder, unless the manifest names another.
    is_default = spec.columns.image == Columns().image and spec.columns.image not in row
    image, caption = _FILE_NAME if is_default else spec.columns.image, spec.columns.caption
    for field, column in (("image", image), ("caption", caption)):
        if column not in row:
            raise DataError(_no_column(field, column, row, where))
        if not isinstance(row[column], str):
            raise DataError(f"dataset.columns.{field}: column {column!r} in {where} holds {row[column]!r}, not a text")
    return row[image], row[caption]


def _open_table(spec: DatasetSpec, split: str, max_samples: int | None) -> TableSource:
    import datasets  # noqa: PLC0415  seconds to import, and folders do not need it

    try:
        table = datasets.load_dataset(spec.source, split=split)
    except Exception as error:
        # The library raises dozens of kinds, and whatever it is, this data set cannot be used.
        summary = " ".join(str(error).split())[:300]
        raise DataError(f"dataset.source: cannot load split {split!r} of {spec.source}: {summary}") from error
    for field, column in (("image", spec.columns.image), ("caption", spec.columns.caption)):
        if column not in table.column_names:
            raise DataError(_no_column(field, column, table.column_names, spec.source))
    if max_samples is not None:
        table = table.select(range(min(max_samples, len(table))))
    table = table.cast_column(spec.columns.image, datasets.Image(decode=False))
    return TableSource(table, spec.columns.image, spec.columns.caption)


def _no_column(field: str, column: str, columns: Sequence[str] | Mapping[str, Any], where: str) -> str:
    names = ", ".join(sorted(columns)) or "none"
    return f"dataset.columns.{field}: there is no column {column!r} in {where}; the columns are {names}"


def decode_sample(source: Source, index: int) -> Image.Image:
    """The image of a sample as RGB.

    Raises:
        DataError: it is broken.
    """
    with source.open(index) as file, _whole_image(source, index):
        return images.decode(file)


def all_square(source: Source) -> bool:
    """Whether every image is square, so that there is nothing to crop; reads their headers.

    Raises:
        DataError: one is broken.
    """
    return all(_is_square(source, index) for index in range(len(source)))


def _is_square(source: Source, index: int) -> bool:
    with source.open(index) as file, _whole_image(source, index):
        return images.is_square(file)


@contextlib.contextmanager
def _whole_image(source: Source, index: int) -> Iterator[None]:
    try:
        yield
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"dataset.source: {source.name(index)} is not a whole image: {error}") from error
