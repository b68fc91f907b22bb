"""Checks a local data set: that it exists, that it has the split, and its first samples.

The trainer checks all of them, and reads tables, which this module does not open.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from finetune_contract.image_folder import (
    FILE_NAME,
    LIST_SUFFIXES,
    METADATA_NAMES,
    caption_file_of,
    decode_text,
    is_image,
    read_csv,
    repeats_of,
    select_split,
)
from finetune_contract.input_spec import DatasetSpec
from finetune_operator.cli.manifest import is_hub_id, is_url

METADATA = METADATA_NAMES[0]
NUM_PROBED = 16
"""Number of samples that are checked: enough to detect a wrong folder, and fast for a large data set."""
TABLES = (".parquet", ".tar")


def find_dataset_problems(dataset: DatasetSpec, split_field: str, split: str, needs_captions: bool) -> Iterator[str]:
    """Yield a message for every problem of one split of a local data set.

    Args:
        dataset: with an absolute path, a hub id or a URL. Only a path is checked.
        split_field: the field below spec that names the split.
        split: name of the split.
        needs_captions: whether the method needs a caption for every image.
    """
    folder = Path(dataset.source)
    if is_url(dataset.source) or (is_hub_id(dataset.source) and not folder.is_absolute()):
        return
    if folder.is_file():
        if folder.suffix not in (*LIST_SUFFIXES, *TABLES):
            yield (
                f"spec.dataset.source: {folder} is a file; write the folder that contains {METADATA}, or a .jsonl, "
                ".csv, .parquet or .tar file"
            )
        elif folder.suffix in LIST_SUFFIXES:
            yield from _sample_problems(dataset, folder, needs_captions)
        return
    if not folder.is_dir():
        yield f"spec.dataset.source: {folder} does not exist; write a folder with {METADATA} or a hub id (owner/name)"
        return
    metadata = find_metadata(dataset, split)
    if metadata is None or metadata.parent == folder:
        splits = sorted({path.parent.name for name in METADATA_NAMES for path in folder.glob(f"*/{name}")})
        if splits:
            yield f"spec.{split_field}: {folder} has no split {split!r}; write one of {', '.join(splits)}"
            return
    if metadata is None:
        yield from _image_problems(dataset, split_field, split, needs_captions)
    else:
        yield from _sample_problems(dataset, metadata, needs_captions)


def find_metadata(dataset: DatasetSpec, split: str) -> Path | None:
    """Return the metadata file of a split: in the split's folder, or at the top of a data set without splits."""
    folder = Path(dataset.source)
    candidates = (place / name for place in (folder / split, folder) for name in METADATA_NAMES)
    return next((path for path in candidates if path.is_file()), None)


def _image_problems(dataset: DatasetSpec, split_field: str, split: str, needs_captions: bool) -> Iterator[str]:
    """Check a folder without metadata: it has images, and captions if the method needs them."""
    folder = Path(dataset.source)
    names = _list_files(folder)
    if any(Path(name).suffix in TABLES for name in names):
        return
    _, files = select_split(names, split)
    images = [name for name in files if is_image(name)][: dataset.max_samples]
    lacks = f"{folder} contains neither {METADATA} nor {split}/{METADATA}"
    if not images and (others := sorted({name.partition("/")[0] for name in names if is_image(name)})):
        yield f"spec.{split_field}: {folder} has no split {split!r}; write one of {', '.join(others)}"
    elif not images:
        yield f"spec.dataset.source: {lacks}, nor images; write one of them"
    elif dataset.columns.conditioning is not None:
        yield f"spec.dataset.source: {lacks}; write one that names the conditioning images"
    elif needs_captions:
        present = frozenset(files)
        missing = [name for name in images if caption_file_of(name, present) is None and repeats_of(name) is None]
        if len(missing) == len(images):
            yield f"spec.dataset.source: {lacks}; write one of them, or a .txt file with its caption next to each image"
        elif missing:
            yield (
                f"spec.dataset.source: {len(missing)} of {len(images)} images in {folder} have no caption, e.g. "
                f"{missing[0]}; write a .txt file with its caption next to each, or remove them"
            )


def _list_files(folder: Path) -> list[str]:
    found: list[str] = []
    for place, _, names in os.walk(folder):
        below = Path(place).relative_to(folder)
        found += [(below / name).as_posix() for name in names]
    return sorted(found)


def _sample_problems(dataset: DatasetSpec, metadata: Path, needs_captions: bool) -> Iterator[str]:
    """Check the first samples."""
    if metadata.suffix in TABLES:
        return
    num_checked = min(NUM_PROBED, dataset.max_samples or NUM_PROBED)
    try:
        rows = list(islice(_read_rows(metadata), num_checked))
    except OSError as error:
        yield f"spec.dataset.source: {metadata} cannot be read: {error}"
        return
    except ValueError as error:
        yield f"spec.dataset.source: {metadata}: {error}"
        return
    if not rows:
        yield f"spec.dataset.source: {metadata} contains no samples; write one JSON object per line"
    for number, row in rows:
        # One message is enough: every line is likely to have the same problem.
        if problem := _find_sample_problem(dataset, metadata, number, row, needs_captions):
            yield problem
            return


def _read_rows(metadata: Path) -> Iterator[tuple[int, Any]]:
    """Yield the number of the line of each sample, and its columns.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file has another encoding, or a line is malformed.
    """
    try:
        text = decode_text(metadata.read_bytes())
    except ValueError as error:
        raise ValueError(f"it is not valid UTF-8 ({error}); save it in this encoding") from error
    if metadata.suffix == LIST_SUFFIXES[1]:
        yield from read_csv(text)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number} is not JSON ({error}); write one JSON object per line") from error
            yield number, row


def _find_sample_problem(
    dataset: DatasetSpec, metadata: Path, number: int, row: object, needs_captions: bool
) -> str | None:
    location = f"line {number} of {metadata}"
    if not isinstance(row, dict):
        return f"spec.dataset.source: {location} is not a JSON object; write an object with the sample's columns"
    columns = dataset.columns
    image = columns.image if columns.image in row else FILE_NAME
    if image not in row:
        return _missing_column("image", columns.image, row, location)
    required = {"caption": columns.caption if needs_captions else None, "conditioning": columns.conditioning}
    for field, column in required.items():
        if column is not None and column not in row:
            return _missing_column(field, column, row, location)
    if needs_captions and (problem := _find_caption_problem(row[columns.caption], columns.caption, location)):
        return problem
    return _find_file_problem(metadata, row, image, location)


def _find_caption_problem(value: object, column: str, location: str) -> str | None:
    captions: Sequence[object] = value if isinstance(value, list) and value else [value]
    for caption in captions:
        if not isinstance(caption, str):
            kind = type(caption).__name__
            return (
                f"spec.dataset.columns.caption: {column!r} in {location} is {kind}, not text; write a column of texts"
            )
        if not caption.strip():
            return (
                f"spec.dataset.columns.caption: the caption in {location} is empty; add a caption, or write another "
                "column"
            )
    return None


def _find_file_problem(metadata: Path, row: Mapping[str, Any], image: str, location: str) -> str | None:
    if not isinstance(row[image], str):
        return f"spec.dataset.columns.image: {image!r} in {location} is not a path; write the column of the image files"
    path = metadata.parent / row[image]
    if not path.is_file():
        return f"spec.dataset.source: {location} names the image {path}, which does not exist; add it or fix the line"
    return None


def _missing_column(field: str, column: str, row: Mapping[str, Any], location: str) -> str:
    names = ", ".join(sorted(map(str, row))) or "none"
    return f"spec.dataset.columns.{field}: {location} has no column {column!r}; write one of {names}"
