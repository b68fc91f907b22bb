"""Shards of tensors in safetensors files, as torch's distributed checkpoint writes and reads them.

The layout is that of torch's HuggingFaceStorageWriter: one file for each rank, whose header has the offset of every
shard in the complete tensor (DCP_SHARDING_INFO). So a checkpoint contains no pickle, any number of ranks can read it,
and torch's own tools can, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY

from finetune_trainer.checkpoint.split import group_of
from finetune_trainer.errors import StorageError

GROUP = "shards"
"""Group of tensors that are shards, and prefix of their file names.

The tensors' names begin with their original group, e.g. model.conv_in.weight.
"""


@dataclass(frozen=True)
class _Piece:
    """A shard in a file: rows `first` to `last` (exclusive) of the complete tensor."""

    file: Any
    first: int
    last: int


class ShardReader:
    """Reads slices of complete tensors from shards that any number of ranks wrote.

    Raises:
        StorageError: a file cannot be read.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._pieces: dict[str, list[_Piece]] = {}
        try:
            for path in files:
                if group_of(path.name) == GROUP:
                    self._index(safe_open(path, framework="pt"))
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise StorageError(f"checkpoint shards cannot be read: {error}") from error

    @property
    def names(self) -> set[str]:
        """Return the names of all tensors."""
        return set(self._pieces)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a complete tensor."""
        pieces = self._pieces[name]
        rest = pieces[0].file.get_slice(name).get_shape()[1:]
        return (max(piece.last for piece in pieces), *rest)

    def read(self, name: str, offset: Sequence[int], like: Tensor) -> Tensor:
        """Return the slice of a complete tensor that begins at `offset` and has the shape and dtype of `like`.

        Args:
            name: name of the complete tensor.
            offset: start of the slice; zero in all dimensions except the first.
            like: a tensor with the shape and dtype to return; may be empty.

        Raises:
            StorageError: some rows are in no file.
        """
        found = torch.empty(like.shape, dtype=like.dtype)
        begin, end = offset[0], offset[0] + (like.shape[0] if like.numel() else 0)
        done = begin
        for piece in sorted(self._pieces[name], key=lambda each: each.first):
            first, last = max(piece.first, begin), min(piece.last, end)
            if first < last and first == done:
                rows = piece.file.get_slice(name)[first - piece.first : last - piece.first]
                found[first - begin : last - begin] = rows
                done = last
        if done < end:
            raise StorageError(f"checkpoint shards: rows {done} to {end} of {name} are missing in all files")
        return found

    def _index(self, file: Any) -> None:
        info = json.loads((file.metadata() or {})[CUSTOM_METADATA_KEY])
        for name in file.keys():  # noqa: SIM118  not a mapping
            first = int(info[name][SAVED_OFFSETS_KEY][0])
            rows = file.get_slice(name).get_shape()[0]
            self._pieces.setdefault(name, []).append(_Piece(file, first, first + rows))
