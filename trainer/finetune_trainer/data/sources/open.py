"""Opens the data set that a manifest names, in any layout, streamed or not. Called by `prepare`.

To add a layout, write one module with a `LAYOUT` and add one row to `LAYOUTS`.
"""

from __future__ import annotations

from pathlib import Path

from finetune_contract.bucket import is_bucket_url
from finetune_contract.input_spec import DatasetSpec
from finetune_trainer.data.sources import folder, hub, table
from finetune_trainer.data.sources.base import SampleSource
from finetune_trainer.data.sources.layout import ANY_JOB, DatasetLayout, JobContext, SplitRequest
from finetune_trainer.data.sources.stream import Stream
from finetune_trainer.errors import DataError

LAYOUTS: tuple[DatasetLayout, ...] = (table.LAYOUT, folder.LAYOUT, hub.LAYOUT)
"""All layouts. The first one that matches a file or a folder handles it; the hub handles all other names."""

FILE_SUFFIXES = tuple(suffix for layout in LAYOUTS for suffix in layout.file_suffixes)
"""Suffixes of files that are a data set by themselves, with a single split."""


def open_source(
    spec: DatasetSpec,
    split: str,
    max_samples: int | None = None,
    needs_captions: bool = True,
    job: JobContext = ANY_JOB,
) -> SampleSource:
    """Open one split of a data set whose samples can be read by index.

    Args:
        spec: the manifest's data set.
        split: name of the split.
        max_samples: open only the first `max_samples` samples; None for all.
        needs_captions: refuse images without captions.
        job: the job that reads it.

    Raises:
        DataError: it does not exist, lacks the split or a column, or has no samples.
    """
    request = SplitRequest(spec, split, max_samples, needs_captions, job)
    _check_local_path(request)
    source = find_layout(request).load(request)
    if len(source) == 0:
        raise DataError(no_samples(spec, split))
    return source


def open_stream(  # noqa: PLR0913, PLR0917  every argument differs between the calls
    spec: DatasetSpec,
    split: str,
    max_samples: int | None,
    needs_captions: bool,
    notes: Path,
    job: JobContext = ANY_JOB,
) -> Stream:
    """Open one split of a data set as a stream.

    Args:
        spec: the manifest's data set.
        split: name of the split.
        max_samples: open only the first `max_samples` samples; None for all. The stream may have more rows.
        needs_captions: refuse images without captions.
        notes: folder that keeps the layouts of tables between runs.
        job: the job that reads it.

    Raises:
        DataError: it does not exist, or lacks the split or a column.
        StorageError: it cannot be read now.
    """
    request = SplitRequest(spec, split, max_samples, needs_captions, job)
    _check_local_path(request)
    return find_layout(request).stream(request, notes)


def find_layout(request: SplitRequest) -> DatasetLayout:
    """Return the layout of the requested data set.

    Raises:
        DataError: it is a folder of an object store that does not exist.
        StorageError: it cannot be read now.
    """
    for layout in LAYOUTS:
        if request.names_file(layout.file_suffixes):
            return layout
    if request.is_folder:
        return next(layout for layout in LAYOUTS if layout.matches_folder(request.folder))
    return hub.LAYOUT


def is_on_hub(source: str) -> bool:
    """Return whether a data set is one of the hub: neither a path of this machine nor in an object store."""
    return not (is_bucket_url(source) or source.endswith(FILE_SUFFIXES) or Path(source).exists())


def no_samples(spec: DatasetSpec, split: str) -> str:
    """Return the message for a split that is empty."""
    return (
        f"dataset.source: split {split!r} of {spec.source} has no samples; write a source that has images in this split"
    )


def _check_local_path(request: SplitRequest) -> None:
    """Refuse a path of this machine that does not exist: the hub's answer to it would be misleading."""
    is_path = request.source.startswith(("/", "./", "../", "~"))
    if is_path and request.is_local and not Path(request.source).exists():
        raise DataError(
            f"dataset.source: there is no folder or file {request.source}; write a path that exists in the job's pods"
        )
