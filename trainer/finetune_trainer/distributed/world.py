"""The world that a rank belongs to, and its collectives.

One object stands for both one rank alone and many, so that nothing above asks how many there are. Every collective that
fails because a peer is gone raises FabricError with one sentence.
"""

from __future__ import annotations

import contextlib
import importlib
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from finetune_contract import environment
from finetune_contract.timeouts import COLLECTIVE_TIMEOUT
from finetune_trainer.errors import ConfigError, FabricError

FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS, GROWTH = 0.02, 2.0, 1.2
"""Between two looks whether rank 0 is there: a fifth of the time waited so far, for each look asks a name server."""

_FABRIC_WORDS = ("gloo", "NCCL", "Connection closed", "Connection reset", "connect() timed out")
"""In what torch says when a connection breaks."""
_CPU_BACKENDS = ("gloo", "ccl")

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This rank's place among the others.

    Attributes:
        rank: number of this rank, from 0.
        size: number of ranks.
        local_rank: number of this rank on its node.
        device: where this rank computes.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone writes what all share."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place; every rank gets the same bits."""
        if self.size > 1:
            with self._peers("all_reduce"):
                dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.sum(torch.zeros(1, device=self.device))

    def gather_numbers(self, number: int) -> list[int]:
        """Tell all ranks a number of each, by rank."""
        numbers = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        numbers[self.rank] = number
        return [int(each) for each in self.sum(numbers).tolist()]

    def share(self, value: T, source: int = 0) -> T:
        """Give every rank the value that one holds, rank 0 unless another is named; picklable and small."""
        if self.size == 1:
            return value
        box: list[T] = [value]
        with self._peers("broadcast"):
            dist.broadcast_object_list(box, src=source, device=self.device)
        return box[0]

    def share_tensors(self, tensors: Mapping[str, Tensor] | None, source: int = 0) -> dict[str, Tensor]:
        """Give every rank the named tensors that one rank holds, as copies on the CPU; the others pass None."""
        if self.size == 1:
            assert tensors is not None
            return dict(tensors)
        header = None if tensors is None else [(name, value.shape, value.dtype) for name, value in tensors.items()]
        header = self.share(header, source)
        assert header is not None
        shared: dict[str, Tensor] = {}
        for name, shape, dtype in header:
            value = torch.empty(shape, dtype=dtype) if tensors is None else tensors[name]
            moved = value.to(self.device).contiguous()
            with self._peers("broadcast"):
                dist.broadcast(moved, src=source)
            shared[name] = moved.cpu()
        return shared

    def as_group(self) -> None:
        """See to it that torch has a process group: a rank that is alone has none unless something of torch's asks."""
        if not dist.is_initialized():
            backend = dist.get_default_backend_for_device(self.device)
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size)

    def close(self) -> None:
        """Leave the world in good order, when all ranks do."""
        if dist.is_initialized():
            dist.destroy_process_group()

    @contextlib.contextmanager
    def peers(self, what: str) -> Iterator[None]:
        """A block of somebody else's collectives, with errors of its own besides.

        Raises:
            FabricError: a peer was lost.
        """
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or any(word in str(error) for word in _FABRIC_WORDS):
                first_line = str(error).strip().splitlines()[0]
                raise FabricError(f"rank {self.rank} lost a peer in {what}: {first_line}") from error
            raise

    @contextlib.contextmanager
    def _peers(self, what: str) -> Iterator[None]:
        """Tell the loss of a peer from an error of our own: torch raises RuntimeError for both."""
        try:
            yield
        except RuntimeError as error:
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise FabricError(f"rank {self.rank} lost a peer in {what}: {first_line}") from error


def _load_backend(backend: str) -> None:
    """oneCCL is a backend only once its binding was imported."""
    if backend == "ccl":
        importlib.import_module("oneccl_bindings_for_pytorch")


def await_rank_0(host: str, port: int, patience: timedelta = COLLECTIVE_TIMEOUT) -> None:
    """Wait until rank 0 listens. torch's own client waits ever longer between two tries: it may sleep through a start.

    Returns where it never does, too: torch then says so.
    """
    deadline, pause = time.monotonic() + patience.total_seconds(), FIRST_PAUSE_SECONDS
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host, port), timeout=MAX_PAUSE_SECONDS).close()
        except OSError:
            time.sleep(pause)
            pause = min(MAX_PAUSE_SECONDS, pause * GROWTH)
        else:
            return


def join_world(env: Mapping[str, str]) -> World:
    """Meet the other ranks, by torch's standard variables and the pod's backend.

    Raises:
        ConfigError: the backend is not there.
        FabricError: the others did not come.
    """
    from accelerate import PartialState  # noqa: PLC0415  the rank answers SIGTERM before this slow import

    size, rank = int(env.get("WORLD_SIZE", "1")), int(env.get("RANK", "0"))
    backend = env.get(environment.BACKEND) or ("nccl" if torch.cuda.is_available() else "gloo")
    try:
        if size > 1:
            _load_backend(backend)
            if rank:
                await_rank_0(env["MASTER_ADDR"], int(env["MASTER_PORT"]))
            dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
        # Finds the device of this rank, and takes the process group as it is.
        state = PartialState(cpu=backend in _CPU_BACKENDS)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{environment.BACKEND}: {backend!r} is not available here: {error}") from error
    except RuntimeError as error:
        raise FabricError(f"rank {rank} of {size} could not meet the others: {error}") from error
    return World(state.process_index, state.num_processes, max(0, state.local_process_index), state.device)
