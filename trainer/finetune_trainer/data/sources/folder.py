"""The layout of images in a folder: listed by a metadata.jsonl or another .jsonl file, or just images."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from finetune_contract.input_spec import Columns
from finetune_trainer.data.hashes import hash_text
from finetune_trainer.data.sources.base import missing_column
from finetune_trainer.data.sources.filesystems import Filesystem, open_filesystem, unreadable_file
from finetune_trainer.data.sources.layout import METADATA, DatasetLayout, SplitRequest
from finetune_trainer.data.sources.stream import StreamedRow
from finetune_trainer.errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_JSONL = ".jsonl"
_FILE_NAME = "file_name"


@dataclass(frozen=True)
class SampleRow:
    """One sample: names of files, relative to the folder of the metadata, and the caption."""

    image: str
    caption: str = ""
    conditioning: str | None = None


@dataclass(frozen=True)
class SampleRows:
    """The samples of one split.

    Attributes:
        folder: the folder of the data set.
        subfolder: the subfolder that the names of files are relative to; "" for the folder itself.
        rows: the samples, in the order of the metadata, or else of the names of files.
    """

    folder: Filesystem
    subfolder: str
    rows: Sequence[SampleRow]


class FolderSource:
    """Samples of a folder of this machine; see `SampleSource`."""

    def __init__(self, folder: Path, rows: Sequence[SampleRow]) -> None:
        self._folder = folder
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def caption(self, index: int) -> str:
        """Return the caption of a sample; empty if there is no metadata."""
        return self._rows[index].caption

    def open(self, index: int) -> IO[bytes]:
        """Open the image file.

        Raises:
            DataError: it cannot be read.
        """
        return _open(self.file(index), "image")

    def open_conditioning(self, index: int) -> IO[bytes]:
        """Open the file of the conditioning image.

        Raises:
            DataError: it cannot be read.
        """
        name = self._rows[index].conditioning
        assert name is not None
        return _open(self._folder / name, "conditioning image")

    def name(self, index: int) -> str:
        """Return the path of the image file."""
        return str(self.file(index))

    def file(self, index: int) -> Path:
        """Return the image file."""
        return self._folder / self._rows[index].image


class FolderStream:
    """Samples of a folder that are read where they are stored; see `Stream`.

    Each image is a separate file, so only the images that are missing in the cache are read. The key of a row
    changes with its caption and with the stamps of its files.
    """

    def __init__(self, samples: SampleRows) -> None:
        self._folder = samples.folder
        self._start = f"{samples.subfolder}/" if samples.subfolder else ""
        self._rows = samples.rows

    @property
    def identity(self) -> str:
        """Hash of the location."""
        return hash_text("folder", self._folder.url, self._start)

    def num_parts(self) -> int:
        """Return 1: the ranks can share its rows without reading a file twice."""
        return 1

    def num_rows(self, part: int) -> int:
        """Return the number of rows."""
        del part
        return len(self._rows)

    def key(self, part: int, row: int) -> str:
        """Return the hash of the caption, and of the names and stamps of the files when the stream was opened."""
        del part
        return self._keys[row]

    @cached_property
    def state(self) -> str:
        """Hash of all keys."""
        return hash_text(*self._keys)

    @cached_property
    def _keys(self) -> list[str]:
        return [self._make_key(sample) for sample in self._rows]

    def _make_key(self, sample: SampleRow) -> str:
        conditioning = [] if sample.conditioning is None else [sample.conditioning, self._stamp(sample.conditioning)]
        return hash_text(sample.caption, sample.image, self._stamp(sample.image), *conditioning)

    def read(self, part: int, first: int) -> Iterator[StreamedRow]:
        """Return the rows, starting at row `first`; their files have not been read yet."""
        for row in range(first, self.num_rows(part)):
            sample = self._rows[row]
            conditioning = None if sample.conditioning is None else partial(self._read, sample.conditioning)
            yield StreamedRow(row, sample.caption, partial(self._read, sample.image), conditioning)

    def name(self, index: int, part: int, row: int) -> str:
        """Return the path or URL of the image."""
        del part, row
        return f"{self._folder.url}/{self._start}{self._rows[index].image}"

    def _stamp(self, name: str) -> str:
        return self._folder.stamp(f"{self._start}{name}") or "missing"

    def _read(self, name: str) -> bytes:
        if self._folder.stamp(f"{self._start}{name}") is None:
            raise DataError(
                f"dataset.source: {self._folder.url}/{self._start}{name} does not exist; "
                "restore it, or remove it from the data set"
            )
        return self._folder.read(f"{self._start}{name}")


def load_folder(request: SplitRequest) -> FolderSource:
    """Open one split of a folder, or of a .jsonl file, whose samples can be read by index.

    Raises:
        DataError: it lacks the split or a column, or cannot be read.
    """
    samples = find_samples(request)
    return FolderSource(Path(samples.folder.url) / samples.subfolder, samples.rows)


def stream_folder(request: SplitRequest, notes: Path) -> FolderStream:
    """Open one split of a folder, or of a .jsonl file, as a stream; see `load_folder`."""
    del notes
    return FolderStream(find_samples(request))


def find_samples(request: SplitRequest) -> SampleRows:
    """Find the samples of one split.

    Raises:
        DataError: the folder lacks the split or a column.
        StorageError: it cannot be read now.
    """
    if request.names_file((_JSONL,)):
        parent, name = request.parent_and_name
        folder = open_filesystem(parent)
        return SampleRows(folder, "", read_jsonl(folder, name, request))
    folder, split = request.folder, request.split
    metadata = _find_metadata(folder, split)
    if metadata is not None:
        return SampleRows(folder, metadata.rpartition("/")[0], read_jsonl(folder, metadata, request))
    if request.needs_captions or request.dataset.columns.conditioning is not None:
        raise DataError(
            f"dataset.source: {folder.url} has neither {METADATA} nor {split}/{METADATA}; "
            'write one, with a line such as {"file_name": "0.png", "text": "a caption"} for each image'
        )
    subfolder = split if folder.list_subfolder(split) else ""
    names = folder.list_subfolder(subfolder)
    files = [name for name in names if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES]
    return SampleRows(folder, subfolder, [SampleRow(name) for name in files[: request.max_samples]])


def _find_metadata(folder: Filesystem, split: str) -> str | None:
    """Return the metadata.jsonl of a split: in its own subfolder, or at the top of a data set without splits.

    Raises:
        DataError: only other splits have one.
    """
    own = f"{split}/{METADATA}"
    if folder.stamp(own) is not None:
        return own
    splits = folder.list_subfolders_with(METADATA)
    if splits:
        raise DataError(
            f"dataset.split: {folder.url} has no split {split!r}; write one that it has: {', '.join(splits)}"
        )
    return METADATA if folder.stamp(METADATA) is not None else None


def read_jsonl(folder: Filesystem, name: str, request: SplitRequest) -> list[SampleRow]:
    """Read the samples of a .jsonl file: one JSON object per line, with paths relative to the file's folder.

    Raises:
        DataError: it cannot be read, or a line lacks a column.
        StorageError: it cannot be read now.
    """
    rows: list[SampleRow] = []
    try:
        text = folder.read(name).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"dataset.source: {folder.url}/{name} is not valid UTF-8: {error}; save it in this encoding"
        ) from error
    # Not splitlines: JSON strings may contain other characters that Unicode treats as line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        if request.max_samples is not None and len(rows) == request.max_samples:
            break
        if line.strip():
            rows.append(_parse_row(line, f"{folder.url}/{name}:{number}", request.dataset.columns))
    return rows


def _parse_row(line: str, where: str, columns: Columns) -> SampleRow:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"dataset.source: {where} is not valid JSON: {error}; correct this line") from error
    if not isinstance(row, dict):
        raise DataError(f"dataset.source: {where} is not a JSON object; write one object with a key for each column")
    # The `datasets` library uses this column name for folders. It applies unless the manifest names another column.
    is_default = columns.image == Columns().image and columns.image not in row
    image = _read_text(row, "image", _FILE_NAME if is_default else columns.image, where)
    caption = _read_text(row, "caption", columns.caption, where)
    if columns.conditioning is None:
        return SampleRow(image, caption)
    return SampleRow(image, caption, _read_text(row, "conditioning", columns.conditioning, where))


def _read_text(row: Mapping[str, Any], field: str, column: str, where: str) -> str:
    if column not in row:
        raise DataError(missing_column(field, column, row, where))
    value = row[column]
    if not isinstance(value, str):
        raise DataError(
            f"dataset.columns.{field}: column {column!r} in {where} is {value!r}, which is not a text; "
            "correct this line, or name another column"
        )
    return value


def _open(path: Path, what: str) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(unreadable_file(what, path, error)) from error


LAYOUT = DatasetLayout((_JSONL,), lambda _: True, load_folder, stream_folder)
"""A .jsonl file, or any folder that no other layout recognises."""
