"""Checks a local data set: that it exists, that it has the split, and the first samples of its metadata.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from finetune_contract.input_spec import DatasetSpec
from finetune_operator.cli.manifest import is_hub_id, is_url

METADATA = "metadata.jsonl"
FILE_NAME = "file_name"
"""Column name of the image folder convention, used if the image column is missing."""
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
        if folder.suffix not in (".jsonl", *TABLES):
            yield (
                f"spec.dataset.source: {folder} is a file; write the folder that contains {METADATA}, or a .jsonl, "
                ".parquet or .tar file"
            )
        return
    if not folder.is_dir():
        yield f"spec.dataset.source: {folder} does not exist; write a folder with {METADATA} or a hub id (owner/name)"
        return
    metadata = find_metadata(dataset, split)
    if metadata is None or metadata.parent == folder:
        splits = sorted(path.parent.name for path in folder.glob(f"*/{METADATA}"))
        if splits:
            yield f"spec.{split_field}: {folder} has no split {split!r}; write one of {', '.join(splits)}"
            return
    if metadata is None:
        if not needs_captions or any(path.suffix in TABLES for path in folder.rglob("*")):
            return
        yield f"spec.dataset.source: {folder} contains neither {METADATA} nor {split}/{METADATA}; write one of them"
        return
    yield from _sample_problems(dataset, metadata)


def find_metadata(dataset: DatasetSpec, split: str) -> Path | None:
    """Return the metadata.jsonl of a split: in the split's folder, or at the top of a data set without splits."""
    folder = Path(dataset.source)
    candidates = (folder / split / METADATA, folder / METADATA)
    return next((path for path in candidates if path.is_file()), None)


def _sample_problems(dataset: DatasetSpec, metadata: Path) -> Iterator[str]:
    """Check the first samples. The trainer checks all of them."""
    num_checked = min(NUM_PROBED, dataset.max_samples or NUM_PROBED)
    try:
        with metadata.open(encoding="utf-8") as file:
            lines = list(islice(((number, line) for number, line in enumerate(file, 1) if line.strip()), num_checked))
    except (OSError, UnicodeDecodeError) as error:
        yield f"spec.dataset.source: {metadata} cannot be read: {error}"
        return
    if not lines:
        yield f"spec.dataset.source: {metadata} contains no samples; write one JSON object per line"
    for number, line in lines:
        # One message is enough: every line is likely to have the same problem.
        if problem := _find_sample_problem(dataset, metadata, number, line):
            yield problem
            return


def _find_sample_problem(dataset: DatasetSpec, metadata: Path, number: int, line: str) -> str | None:
    location = f"line {number} of {metadata}"
    try:
        row = json.loads(line)
    except ValueError as error:
        return f"spec.dataset.source: {location} is not JSON ({error}); write one JSON object per line"
    if not isinstance(row, dict):
        return f"spec.dataset.source: {location} is not a JSON object; write an object with the sample's columns"
    columns = dataset.columns
    image = columns.image if columns.image in row else FILE_NAME
    if image not in row:
        return _missing_column("image", columns.image, row, location)
    for field, column in (("caption", columns.caption), ("conditioning", columns.conditioning)):
        if column is not None and column not in row:
            return _missing_column(field, column, row, location)
    return _find_value_problem(dataset, metadata, row, image, location)


def _find_value_problem(
    dataset: DatasetSpec, metadata: Path, row: Mapping[str, Any], image: str, location: str
) -> str | None:
    caption = row[dataset.columns.caption]
    if not isinstance(caption, str):
        kind, column = type(caption).__name__, dataset.columns.caption
        return f"spec.dataset.columns.caption: {column!r} in {location} is {kind}, not text; write a column of texts"
    if not caption.strip():
        return (
            f"spec.dataset.columns.caption: the caption in {location} is empty; add a caption, or write another column"
        )
    if not isinstance(row[image], str):
        return f"spec.dataset.columns.image: {image!r} in {location} is not a path; write the column of the image files"
    path = metadata.parent / row[image]
    if not path.is_file():
        return f"spec.dataset.source: {location} names the image {path}, which does not exist; add it or fix the line"
    return None


def _missing_column(field: str, column: str, row: Mapping[str, Any], location: str) -> str:
    names = ", ".join(sorted(map(str, row))) or "none"
    return f"spec.dataset.columns.{field}: {location} has no column {column!r}; write one of {names}"
