"""The layout of images in a folder: listed by a metadata file or another list, or just images with caption files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import IO

from finetune_contract.image_folder import (
    LIST_SUFFIXES,
    METADATA_NAMES,
    caption_file_of,
    decode_text,
    is_hidden,
    is_image,
    repeats_of,
    select_split,
    split_captions,
    unread_files,
)
from finetune_trainer.data.hashes import hash_text
from finetune_trainer.data.sources.filesystems import Filesystem, open_filesystem, unreadable_file
from finetune_trainer.data.sources.layout import DatasetLayout, SplitRequest, find_metadata, join_first
from finetune_trainer.data.sources.sample_lists import SampleRow, read_list
from finetune_trainer.data.sources.stream import StreamedRow
from finetune_trainer.errors import DataError

_NUM_READERS = 16
"""Caption files that are read at the same time."""


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

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of a sample; empty if it has none."""
        return self._rows[index].captions

    def repeats(self, index: int) -> int:
        """Return the number of times that each epoch uses a sample."""
        return self._rows[index].repeats

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
        return _open(self.conditioning_file(index), "conditioning image")

    def name(self, index: int) -> str:
        """Return the path of the image file."""
        return str(self.file(index))

    def file(self, index: int) -> Path:
        """Return the image file."""
        return self._folder / self._rows[index].image

    def conditioning_file(self, index: int) -> Path:
        """Return the file of the conditioning image."""
        name = self._rows[index].conditioning
        assert name is not None
        return self._folder / name


class FolderStream:
    """Samples of a folder that are read where they are stored; see `Stream`.

    Each image is a separate file, so only the images that are missing in the cache are read. The key of a row
    changes with its captions and with the stamps of its files.
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
        """Return the hash of the captions, and of the names and stamps of the files when the stream was opened."""
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
        captions = sample.captions or ("",)
        caption = captions[0] if len(captions) == 1 else hash_text("captions", *captions)
        conditioning = [] if sample.conditioning is None else [sample.conditioning, self._stamp(sample.conditioning)]
        return hash_text(caption, sample.image, self._stamp(sample.image), *conditioning)

    def read(self, part: int, first: int) -> Iterator[StreamedRow]:
        """Return the rows, starting at row `first`; their files have not been read yet."""
        for row in range(first, self.num_rows(part)):
            sample = self._rows[row]
            conditioning = None if sample.conditioning is None else partial(self._read, sample.conditioning)
            yield StreamedRow(row, sample.captions, partial(self._read, sample.image), conditioning)

    def repeats(self, part: int, row: int) -> int:
        """Return the number of times that each epoch uses a row."""
        del part
        return self._rows[row].repeats

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
    """Open one split of a folder, or of a file that lists samples, whose samples can be read by index.

    Raises:
        DataError: it lacks the split or a column, or cannot be read.
    """
    samples = find_samples(request)
    return FolderSource(Path(samples.folder.url) / samples.subfolder, samples.rows)


def stream_folder(request: SplitRequest, notes: Path) -> FolderStream:
    """Open one split of a folder, or of a file that lists samples, as a stream; see `load_folder`."""
    del notes
    return FolderStream(find_samples(request))


def find_samples(request: SplitRequest) -> SampleRows:
    """Find the samples of one split.

    Raises:
        DataError: the folder lacks the split, a column or captions.
        StorageError: it cannot be read now.
    """
    if request.names_file(LIST_SUFFIXES):
        parent, name = request.parent_and_name
        folder = open_filesystem(parent)
        return SampleRows(folder, "", read_list(folder, name, request))
    folder = request.folder
    metadata = find_metadata(folder, request.split)
    if metadata is not None:
        return SampleRows(folder, metadata.rpartition("/")[0], read_list(folder, metadata, request))
    if request.dataset.columns.conditioning is not None:
        column = request.dataset.columns.conditioning
        raise DataError(
            _no_metadata(request, f'{{"file_name": "0.png", "text": "a caption", "{column}": "conditions/0.png"}}')
        )
    return _find_images(folder, request)


def _no_metadata(request: SplitRequest, example: str) -> str:
    url, name = request.folder.url, METADATA_NAMES[0]
    return (
        f"dataset.source: {url} has neither {name} nor {request.split}/{name}; write one, with a line such as "
        f"{example} for each image"
    )


def _find_images(folder: Filesystem, request: SplitRequest) -> SampleRows:
    """Find the images of a split without metadata, with the captions next to them."""
    names = folder.list_files()
    subfolder, files = select_split(names, request.split, request.job.splits)
    images = [name for name in files if is_image(name)]
    left_out = sorted({name.partition("/")[0] for name in names if is_image(name) and not is_hidden(name)} - {""})
    if not images and any(is_image(name) and not is_hidden(name) for name in names):
        raise DataError(
            f"dataset.split: {folder.url} has no split {request.split!r}; write one that it has: {', '.join(left_out)}"
        )
    if unread := unread_files(files):
        request.job.warn(
            f"dataset.source: {len(unread)} files of {folder.url} are not read, because they are not images of a known "
            f"format: {join_first(unread)}"
        )
    rows = [_image_row(name) for name in images[: request.max_samples]]
    rows = _read_captions(folder, subfolder, rows, frozenset(files))
    if request.needs_captions:
        rows = _require_captions(folder, subfolder, rows, request)
    _warn_of_repeats(folder, rows, request.job.warn)
    return SampleRows(folder, subfolder, rows)


def _image_row(image: str) -> SampleRow:
    found = repeats_of(image)
    return SampleRow(image) if found is None else SampleRow(image, repeats=found[0])


def _read_captions(
    folder: Filesystem, subfolder: str, rows: Sequence[SampleRow], files: frozenset[str]
) -> list[SampleRow]:
    start = f"{subfolder}/" if subfolder else ""

    def read(row: SampleRow) -> SampleRow:
        name = caption_file_of(row.image, files)
        if name is None:
            return row
        try:
            text = decode_text(folder.read(f"{start}{name}"))
        except ValueError as error:
            raise DataError(
                f"dataset.source: {folder.url}/{start}{name} is not valid UTF-8: {error}; save it in this encoding"
            ) from error
        return replace(row, captions=split_captions(text) or ("",))

    with ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="captions") as pool:
        return list(pool.map(read, rows))


def _require_captions(
    folder: Filesystem, subfolder: str, rows: Sequence[SampleRow], request: SplitRequest
) -> list[SampleRow]:
    """Return rows with captions: an image without a caption file takes the name of its folder `10_name`.

    Raises:
        DataError: an image has neither.
    """
    named = [row if row.captions else replace(row, captions=_folder_caption(row.image)) for row in rows]
    missing = [row.image for row in named if not row.captions]
    if len(missing) == len(rows) and rows:
        raise DataError(
            _no_metadata(request, '{"file_name": "0.png", "text": "a caption"}')
            + ", or a .txt file with its caption next to each image"
        )
    if missing:
        place = f"{folder.url}/{subfolder}".rstrip("/")
        raise DataError(
            f"dataset.source: {len(missing)} of {len(rows)} images of {place} have no caption: {join_first(missing)}; "
            "write a .txt file with its caption next to each, or remove them"
        )
    return named


def _folder_caption(image: str) -> tuple[str, ...]:
    found = repeats_of(image)
    return () if found is None else (found[1],)


def _warn_of_repeats(folder: Filesystem, rows: Sequence[SampleRow], warn: Callable[[str], None]) -> None:
    counts: dict[str, int] = {}
    for row in rows:
        if row.repeats > 1:
            counts[f"{row.repeats} times for {row.image.rpartition('/')[0]}"] = row.repeats
    if counts:
        warn(
            f"dataset.source: folders of {folder.url} name the number of uses of each image in an epoch: "
            f"{join_first(list(counts))}; rename a folder for which this is not meant"
        )


def _open(path: Path, what: str) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(unreadable_file(what, path, error)) from error


LAYOUT = DatasetLayout(LIST_SUFFIXES, lambda _: True, load_folder, stream_folder)
"""A .jsonl or .csv file, or any folder that no other layout recognises."""
