"""The layout of tables in files: .parquet, and .tar as WebDataset writes it; a single file, or a folder of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath

from finetune_contract.image_folder import METADATA_NAMES, SPLIT_NAMES, is_hidden, is_image
from finetune_trainer.data.sources import hub
from finetune_trainer.data.sources.filesystems import Filesystem, open_filesystem
from finetune_trainer.data.sources.hub import TableSource
from finetune_trainer.data.sources.layout import DatasetLayout, SplitRequest
from finetune_trainer.data.sources.parquet import ParquetStream
from finetune_trainer.data.sources.stream import Stream
from finetune_trainer.data.sources.table_cells import TableFile
from finetune_trainer.data.sources.tar import TarStream
from finetune_trainer.errors import DataError

_PARQUET, _TAR = ".parquet", ".tar"
_SUFFIXES = (_PARQUET, _TAR)
_WEBDATASET = "webdataset"


def load_tables(request: SplitRequest) -> TableSource:
    """Open one split of a file, or of a folder of files, whose samples can be read by index.

    Raises:
        DataError: it cannot be loaded, or lacks the split or a column.
    """
    if not request.names_file(_SUFFIXES):
        return hub.load_split(request)
    return hub.load_split(request, "parquet" if request.source.endswith(_PARQUET) else _WEBDATASET)


def stream_tables(request: SplitRequest, notes: Path) -> Stream:
    """Open one split of a file, or of a folder of files, as a stream.

    Raises:
        DataError: it cannot be loaded, or lacks the split or a column.
        StorageError: it cannot be read now.
    """
    if request.names_file(_SUFFIXES):
        parent, name = request.parent_and_name
        return _stream_files(open_filesystem(parent, name), [name], request, notes)
    if request.is_local:
        # The library knows more ways to name the splits of a folder.
        return hub.stream_split(request, notes)
    return _stream_files(request.folder, find_tables(request.folder, request.split), request, notes)


def _stream_files(folder: Filesystem, names: Sequence[str], request: SplitRequest, notes: Path) -> Stream:
    files = [
        TableFile(f"{folder.url}/{name}", folder.stamp(name) or "missing", partial(folder.open, name)) for name in names
    ]
    if names[0].endswith(_PARQUET):
        return ParquetStream(files, hub.columns_of(request), notes)
    if not request.is_local:
        return TarStream(files, hub.columns_of(request))
    urls = [f"{folder.url}/{name}" for name in names]
    return hub.stream_split(request, notes, _WEBDATASET, {request.split: urls})


def holds_tables(folder: Filesystem) -> bool:
    """Return whether a folder is one of tables, and not of images with their metadata."""
    surest, *others = METADATA_NAMES
    if _has(folder, surest):
        return False
    names = [name for name in folder.list_files() if not is_hidden(name)]
    # Tables may have these names, too.
    if any(_has(folder, name) for name in others) and any(is_image(name) for name in names):
        return False
    return any(name.endswith(_SUFFIXES) for name in names)


def _has(folder: Filesystem, metadata: str) -> bool:
    return folder.stamp(metadata) is not None or bool(folder.list_subfolders_with(metadata))


def find_tables(folder: Filesystem, split: str) -> list[str]:
    """Return the names of the tables of a split, in order: the split is a folder, or the start of the file's name.

    Raises:
        DataError: there are only tables of other splits.
    """
    tables = [name for name in folder.list_files() if name.endswith(_SUFFIXES) and not is_hidden(name)]
    suffix = _PARQUET if any(name.endswith(_PARQUET) for name in tables) else _TAR
    tables = [name for name in tables if name.endswith(suffix)]
    own = [name for name in tables if _belongs_to(name, split)]
    others = [other for other in SPLIT_NAMES if any(_belongs_to(name, other) for name in tables)]
    if not own and others:
        raise DataError(
            f"dataset.split: {folder.url} has no split {split!r}; write one that it has: {', '.join(others)}"
        )
    return own or tables


def _belongs_to(name: str, split: str) -> bool:
    *folders, file = PurePosixPath(name).parts
    return split in folders or re.match(rf"{re.escape(split)}[-_.]", file) is not None


LAYOUT = DatasetLayout(_SUFFIXES, holds_tables, load_tables, stream_tables)
"""A .parquet or .tar file, or a folder that has them and no metadata of images."""
