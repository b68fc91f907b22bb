"""Opening the data set that a manifest names for reading it where it lies, whatever kind it is of."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from finetune_contract.bucket import is_bucket_url
from finetune_contract.spec import DatasetSpec
from finetune_trainer.data.cache.hashes import hash_text
from finetune_trainer.data.sources.filesystems import Folder, Place, open_place
from finetune_trainer.data.sources.folder import read_folder, read_jsonl
from finetune_trainer.data.sources.stream import Stream
from finetune_trainer.data.sources.stream_folder import FolderStream
from finetune_trainer.data.sources.stream_table import IterableStream, ParquetStream, TableFile, Wanted
from finetune_trainer.data.sources.table import (
    JSONL,
    PARQUET,
    SINGLE_FILES,
    check_place,
    holds_tables,
    loading,
    tables_of_split,
)


@dataclass(frozen=True)
class Opener:
    """Opens one split of a data set as a stream.

    Attributes:
        spec: the manifest's data set.
        split: name of the split.
        max_samples: open only the first so many, where that can be told.
        needs_captions: whether images without captions are refused.
        notes: folder for what is remembered of tables.
    """

    spec: DatasetSpec
    split: str
    max_samples: int | None
    needs_captions: bool
    notes: Path

    def open(self) -> Stream:
        """Open it.

        Raises:
            DataError: it is not there, or has no such split or column.
            StorageError: it cannot be read now.
        """
        source = self.spec.source
        is_local = not is_bucket_url(source)
        parent, name = (str(Path(source).parent), Path(source).name) if is_local else source.rsplit("/", 1)
        if source.endswith(SINGLE_FILES):
            check_place(self.spec)
            # Of the samples of a .jsonl file every image's stamp is wanted, so all objects are listed.
            place = open_place(parent, None if source.endswith(JSONL) else name)
            if source.endswith(JSONL):
                return FolderStream(place, "", read_jsonl(place, name, self.spec, self.max_samples))
            return self._tables(place, [name])
        if is_local and not Path(source).is_dir():
            check_place(self.spec)
            return self._of_library(source)
        place = open_place(source)
        if not holds_tables(place):
            below, rows = read_folder(place, self.spec, self.split, self.max_samples, self.needs_captions)
            return FolderStream(place, below, rows)
        return self._of_library(source) if is_local else self._tables(place, tables_of_split(place, self.split))

    @property
    def _wanted(self) -> Wanted:
        return Wanted(self.spec.columns, self.needs_captions, self.spec.source)

    def _tables(self, place: Place, names: Sequence[str]) -> Stream:
        """Tables of a folder or a bucket."""
        if names[0].endswith(PARQUET):
            files = [
                TableFile(f"{place.url}/{name}", place.stamp(name) or "missing", partial(place.open, name))
                for name in names
            ]
            return ParquetStream(files, self._wanted, self.notes)
        urls = [f"{place.url}/{name}" for name in names]
        return self._of_library("webdataset", {self.split: urls})

    def _of_library(self, path: str, data_files: Mapping[str, Sequence[str]] | None = None) -> Stream:
        """What the `datasets` library finds: on the hub, or in a folder with its own way of naming splits."""
        import datasets  # noqa: PLC0415  seconds to import, and folders do not need it

        with loading(self.spec.source, self.split):
            builder = datasets.load_dataset_builder(path, data_files=data_files)
            by_split: Mapping[str, Any] = builder.config.data_files or {}
            found = by_split.get(self.split)
            if found is None:
                raise ValueError(f"it has {', '.join(map(str, by_split)) or 'no files'}")
            stamp = hash_text(*map(str, found.origin_metadata))
            files = [(str(url), stamp) for url in found]
            if type(builder).__name__ != "Parquet":
                dataset = builder.as_streaming_dataset(split=self.split)
                for column in (self.spec.columns.image, self.spec.columns.conditioning):
                    if column is not None and column in (dataset.column_names or [column]):
                        dataset = dataset.cast_column(column, datasets.Image(decode=False))
                return IterableStream(dataset, files, self._wanted)
        tables = [TableFile(url, stamp, partial(_open_url, url)) for url, stamp in files]
        return ParquetStream(tables, self._wanted, self.notes)


def _open_url(url: str) -> contextlib.AbstractContextManager[Any]:
    if "://" not in url:
        return Folder(Path(url).parent).open(Path(url).name)
    import fsspec  # noqa: PLC0415  what lies on the hub alone needs it

    opened: contextlib.AbstractContextManager[Any] = fsspec.open(url, "rb")
    return opened
