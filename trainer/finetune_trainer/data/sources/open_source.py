"""Opening the data set that a manifest names, whatever kind it is of."""

from __future__ import annotations

from pathlib import Path

from finetune_contract.spec import DatasetSpec
from finetune_trainer.data.sources.base import Source
from finetune_trainer.data.sources.filesystems import Folder
from finetune_trainer.data.sources.folder import open_folder, open_jsonl
from finetune_trainer.data.sources.table import JSONL, check_place, holds_tables, open_table
from finetune_trainer.errors import DataError


def open_source(spec: DatasetSpec, split: str, max_samples: int | None = None, needs_captions: bool = True) -> Source:
    """Open one split of a data set. A single .jsonl, .parquet or .tar file is one split, whatever its name.

    Args:
        spec: the manifest's data set.
        split: name of the split.
        max_samples: open only the first so many.
        needs_captions: whether images without captions are refused.

    Raises:
        DataError: it is not there, has no such split or column, or holds no sample.
    """
    path = Path(spec.source)
    source: Source
    check_place(spec)
    if path.is_dir() and not holds_tables(Folder(path)):
        source = open_folder(path, spec, split, max_samples, needs_captions)
    elif path.suffix == JSONL:
        source = open_jsonl(path, spec, max_samples)
    else:
        source = open_table(spec, split, max_samples, needs_captions)
    if len(source) == 0:
        raise DataError(f"dataset.source: split {split!r} of {spec.source} holds no samples")
    return source
