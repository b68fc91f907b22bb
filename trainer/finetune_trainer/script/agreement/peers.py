"""The other ranks of a script's job, over a group of its own on the CPU.

It is separate from the script's group, so its calls never mix with those of the script, cost no synchronization with
a GPU, and may wait for as long as rank 0 saves or validates alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from finetune_trainer.errors import FabricError

WAIT = timedelta(hours=24)
"""Longest wait for a rank that saves or validates alone. A lost peer is detected by its closed connection, or by the
operator, and a hang by the operator."""

T = TypeVar("T")


class Peers:
    """This rank's connection to the others.

    Args:
        rank: number of this rank.
        size: number of ranks.
        stride: distance of the rank that keeps a copy of this rank's state: that of the next node if there are several.
    """

    def __init__(self, rank: int, size: int, stride: int = 1) -> None:
        self.rank = rank
        self.size = size
        self.kept_for = (rank - stride) % size
        """Rank whose state this rank keeps."""
        self._keeper = (rank + stride) % size
        self._group: dist.ProcessGroup | None = None
        if size > 1:
            group = dist.new_group(backend="gloo", timeout=WAIT)
            assert isinstance(group, dist.ProcessGroup)
            self._group = group

    def sum(self, values: list[int]) -> list[int]:
        """Return the sums of the values over all ranks.

        Raises:
            FabricError: a peer was lost.
        """
        if self._group is None:
            return values
        tensor = torch.tensor(values, dtype=torch.int64)
        with self._errors():
            dist.all_reduce(tensor, group=self._group)
        return [int(each) for each in tensor.tolist()]

    def share(self, value: T) -> T:
        """Return the value of rank 0 on every rank.

        Raises:
            FabricError: a peer was lost.
        """
        if self._group is None:
            return value
        box: list[T] = [value]
        with self._errors():
            dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def barrier(self) -> None:
        """Wait until all ranks have called this.

        Raises:
            FabricError: a peer was lost.
        """
        self.sum([0])

    def start_sum(self, tensor: Tensor) -> Any:
        """Start to sum a tensor over all ranks, in place; `finish` waits for the result.

        Raises:
            FabricError: a peer was lost.
        """
        with self._errors():
            return dist.all_reduce(tensor, group=self._group, async_op=True)

    def start_exchange(self, sent: Tensor, received: Tensor) -> list[Any]:
        """Start to send a tensor to this rank's keeper, and to receive that of the rank that this one keeps.

        Raises:
            FabricError: a peer was lost.
        """
        with self._errors():
            return [
                dist.irecv(received, src=self.kept_for, group=self._group),
                dist.isend(sent, dst=self._keeper, group=self._group),
            ]

    def finish(self, works: Iterable[Any], timeout: timedelta) -> None:
        """Wait for calls that were started.

        Raises:
            FabricError: a peer was lost, or the time is over.
        """
        with self._errors():
            for work in works:
                work.wait(timeout)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> FabricError:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return FabricError(f"rank {self.rank} lost a peer between two steps: {first_line}")
