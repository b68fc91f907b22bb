"""Shards of tensors in safetensors files, as torch's distributed checkpoint writes and reads them.

The layout is that of torch's HuggingFaceStorageWriter: a file for each rank, and in its header, for every tensor, where
the shard begins in the whole one (DCP_SHARDING_INFO). So a checkpoint is written without a pickle, can be read at any
number of ranks, and torch's own tools read it, too.
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
"""The group of tensors, and so the beginning of the files' names, that holds shards: names begin with their own group,
e.g. model.conv_in.weight."""


@dataclass(frozen=True)
class _Piece:
    """A shard in a file: the rows from `first` to `last` of the whole tensor."""

    file: Any
    first: int
    last: int


class ShardReader:
    """Reads slices of whole tensors from the shards that any number of ranks wrote.

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
        """Names of all tensors."""
        return set(self._pieces)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a whole tensor."""
        pieces = self._pieces[name]
        rest = pieces[0].file.get_slice(name).get_shape()[1:]
        return (max(piece.last for piece in pieces), *rest)

    def read(self, name: str, offset: Sequence[int], like: Tensor) -> Tensor:
        """The slice of a whole tensor that has the shape and the dtype of `like` and begins at `offset`.

        Args:
            name: of the whole tensor.
            offset: zero in all dimensions but the first.
            like: may be empty.

        Raises:
            StorageError: some of it is in no file.
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
            raise StorageError(f"checkpoint shards: rows {done} to {end} of {name} are in no file")
        return found

    def _index(self, file: Any) -> None:
        info = json.loads((file.metadata() or {})[CUSTOM_METADATA_KEY])
        for name in file.keys():  # noqa: SIM118  no mapping
            first = int(info[name][SAVED_OFFSETS_KEY][0])
            rows = file.get_slice(name).get_shape()[0]
            self._pieces.setdefault(name, []).append(_Piece(file, first, first + rows))
