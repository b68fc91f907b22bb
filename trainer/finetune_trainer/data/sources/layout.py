"""The interface of a layout of data sets, and the request that a layout answers. `open` has the table of layouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from finetune_contract.bucket import is_bucket_url
from finetune_contract.image_folder import METADATA_NAMES
from finetune_contract.input_spec import DatasetSpec
from finetune_trainer.data.sources.base import SampleSource
from finetune_trainer.data.sources.filesystems import Filesystem, open_filesystem
from finetune_trainer.data.sources.stream import Stream
from finetune_trainer.errors import DataError

_NUM_NAMED = 10


@dataclass(frozen=True)
class JobContext:
    """The job that reads a data set.

    Attributes:
        splits: names of all splits that it reads: in a folder of images without metadata, each may be a subfolder.
        warn: receives warnings for the user.
    """

    splits: tuple[str, ...] = ()
    warn: Callable[[str], None] = lambda _: None


ANY_JOB = JobContext()
"""A job without other splits, which receives no warnings."""


@dataclass(frozen=True)
class SplitRequest:
    """One split of the data set that a manifest names.

    Attributes:
        dataset: the manifest's data set.
        split: name of the split. A data set that is a single file is one split with any name.
        max_samples: open only the first `max_samples` samples; None for all. A stream may return more.
        needs_captions: refuse images without captions.
        job: the job that reads it.
    """

    dataset: DatasetSpec
    split: str
    max_samples: int | None
    needs_captions: bool
    job: JobContext = ANY_JOB

    @property
    def source(self) -> str:
        """The path, URL or hub name of the data set."""
        return self.dataset.source

    @property
    def is_local(self) -> bool:
        """Return whether the source is not in an object store: a path, or a name of the hub."""
        return not is_bucket_url(self.source)

    @property
    def is_folder(self) -> bool:
        """Return whether the source is a folder, provided that it does not name a single file of a data set."""
        return not self.is_local or Path(self.source).is_dir()

    def names_file(self, suffixes: tuple[str, ...]) -> bool:
        """Return whether the source is a single file with one of these suffixes."""
        return self.source.endswith(suffixes) and not (self.is_local and Path(self.source).is_dir())

    @property
    def parent_and_name(self) -> tuple[str, str]:
        """The folder, as a path or URL, and the name of a source that is a single file."""
        if self.is_local:
            return str(Path(self.source).parent), Path(self.source).name
        parent, _, name = self.source.rpartition("/")
        return parent, name

    @cached_property
    def folder(self) -> Filesystem:
        """The folder that the source names.

        Raises:
            DataError: it does not exist.
            StorageError: it cannot be read now.
        """
        return open_filesystem(self.source)


def find_metadata(folder: Filesystem, split: str) -> str | None:
    """Return the metadata file of a split: in its own subfolder, or at the top of a data set without splits.

    Raises:
        DataError: only other splits have one.
    """
    own = next((path for name in METADATA_NAMES if folder.stamp(path := f"{split}/{name}") is not None), None)
    if own is not None:
        return own
    splits = sorted({subfolder for name in METADATA_NAMES for subfolder in folder.list_subfolders_with(name)})
    if splits:
        raise DataError(
            f"dataset.split: {folder.url} has no split {split!r}; write one that it has: {', '.join(splits)}"
        )
    return next((name for name in METADATA_NAMES if folder.stamp(name) is not None), None)


def join_first(names: Sequence[str]) -> str:
    """Return the first of many names as a text, and the number of the others."""
    more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    return ", ".join(names[:_NUM_NAMED]) + more


@dataclass(frozen=True)
class DatasetLayout:
    """One layout of data sets.

    Attributes:
        file_suffixes: suffixes of files that are a data set by themselves.
        matches_folder: whether a folder has this layout.
        load: opens a split whose samples can be read by index.
        stream: opens a split that is read in order, where it is stored; the folder keeps notes on files between runs.
    """

    file_suffixes: tuple[str, ...]
    matches_folder: Callable[[Filesystem], bool]
    load: Callable[[SplitRequest], SampleSource]
    stream: Callable[[SplitRequest, Path], Stream]
