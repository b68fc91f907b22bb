"""The world of a rank, and its collectives.

One class represents both a single rank and many, so callers do not check the number of ranks. A collective that fails
because a peer is lost raises FabricError with a one-line message.
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
from finetune_contract.cpu.backend import CCL_BINDING, choose_backend
from finetune_contract.timeouts import COLLECTIVE_TIMEOUT
from finetune_trainer.distributed.cpus import communication_cpus
from finetune_trainer.errors import ConfigError, FabricError

FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS, GROWTH = 0.02, 2.0, 1.2
"""Pauses between two attempts to reach rank 0. They grow with the time waited, because each attempt queries DNS."""

_FABRIC_ERRORS = ("gloo", "NCCL", "Connection closed", "Connection reset", "connect() timed out")
"""Parts of torch's messages when a connection breaks."""
_CPU_BACKENDS = ("gloo", "ccl")

T = TypeVar("T")


class StartedSum:
    """A sum over the ranks that has started. It changes the tensor until `wait` returns."""

    def __init__(self, work: dist.Work | None, world: World) -> None:
        self._work, self._world = work, world

    def wait(self) -> None:
        """Wait until the tensor holds the sum; on a GPU, make the current stream wait.

        Raises:
            FabricError: a peer was lost.
        """
        if self._work is not None:
            with self._world.collective("all_reduce"):
                self._work.wait()
            self._work = None


@dataclass(frozen=True)
class World:
    """This rank's position in the world.

    Attributes:
        rank: global number of this rank, from 0.
        size: number of ranks.
        local_rank: number of this rank on its node, from 0.
        device: device that this rank computes on.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Return whether this is rank 0, the only rank that writes shared files."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place. Every rank gets the same bits."""
        if self.size > 1:
            with self.collective("all_reduce"):
                dist.all_reduce(tensor)
        return tensor

    def start_sum(self, tensor: Tensor) -> StartedSum:
        """Start to sum a tensor over all ranks, in place. All ranks start their collectives in the same order.

        Args:
            tensor: its values must not change until the sum is complete.

        Raises:
            FabricError: a peer was lost.
        """
        if self.size == 1:
            return StartedSum(None, self)
        with self.collective("all_reduce"):
            return StartedSum(dist.all_reduce(tensor, async_op=True), self)

    def barrier(self) -> None:
        """Wait until all ranks have called this."""
        self.sum(torch.zeros(1, device=self.device))

    def gather_numbers(self, number: int) -> list[int]:
        """Return the numbers that all ranks pass, by rank."""
        numbers = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        numbers[self.rank] = number
        return [int(each) for each in self.sum(numbers).tolist()]

    def share(self, value: T, source: int = 0) -> T:
        """Return the value of the source rank (default: rank 0) on every rank. It must be picklable and small."""
        if self.size == 1:
            return value
        box: list[T] = [value]
        with self.collective("broadcast"):
            dist.broadcast_object_list(box, src=source, device=self.device)
        return box[0]

    def share_tensors(self, tensors: Mapping[str, Tensor] | None, source: int = 0) -> dict[str, Tensor]:
        """Return the named tensors of the source rank on every rank, copied to the CPU. The other ranks pass None."""
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
            with self.collective("broadcast"):
                dist.broadcast(moved, src=source)
            shared[name] = moved.cpu()
        return shared

    def as_group(self) -> None:
        """Create a process group if torch has none: a single rank needs one only for some of torch's features."""
        if not dist.is_initialized():
            backend = dist.get_default_backend_for_device(self.device)
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size)

    def close(self) -> None:
        """Destroy the process group. All ranks call it at the end."""
        if dist.is_initialized():
            dist.destroy_process_group()

    @contextlib.contextmanager
    def watch_collectives(self, what: str) -> Iterator[None]:
        """Convert the loss of a peer to FabricError in a block with collectives of torch itself.

        Other errors of the block pass through unchanged.

        Raises:
            FabricError: a peer was lost.
        """
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or any(part in str(error) for part in _FABRIC_ERRORS):
                first_line = str(error).strip().splitlines()[0]
                raise FabricError(f"rank {self.rank} lost a peer in {what}: {first_line}") from error
            raise

    @contextlib.contextmanager
    def collective(self, what: str) -> Iterator[None]:
        """Convert every RuntimeError of one collective to FabricError: torch raises it when a peer is lost."""
        try:
            yield
        except RuntimeError as error:
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise FabricError(f"rank {self.rank} lost a peer in {what}: {first_line}") from error


def read_backend(env: Mapping[str, str]) -> str:
    """Return the backend that the environment names.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        backend = env.get(environment.BACKEND) or ("nccl" if torch.cuda.is_available() else "gloo")
        return choose_backend(backend).backend
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _load_backend(backend: str) -> None:
    """Import oneCCL's binding, which registers its backend."""
    if backend == "ccl":
        importlib.import_module(CCL_BINDING)


def wait_for_rank_0(host: str, port: int, timeout: timedelta = COLLECTIVE_TIMEOUT) -> None:
    """Wait until rank 0 listens, or the timeout has passed: torch then reports the error.

    torch's own client waits with long and growing pauses, so it can notice the start of rank 0 late.
    """
    deadline, pause = time.monotonic() + timeout.total_seconds(), FIRST_PAUSE_SECONDS
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host, port), timeout=MAX_PAUSE_SECONDS).close()
        except OSError:
            time.sleep(pause)
            pause = min(MAX_PAUSE_SECONDS, pause * GROWTH)
        else:
            return


def join_world(env: Mapping[str, str]) -> World:
    """Join the other ranks, by torch's standard variables and the pod's backend.

    Raises:
        ConfigError: the backend is not installed.
        FabricError: not all ranks joined in time.
    """
    from accelerate import PartialState  # noqa: PLC0415  slow: the rank handles SIGTERM before it

    size, rank = int(env.get("WORLD_SIZE", "1")), int(env.get("RANK", "0"))
    backend = read_backend(env)
    try:
        if size > 1:
            _load_backend(backend)
            if rank:
                wait_for_rank_0(env["MASTER_ADDR"], int(env["MASTER_PORT"]))
            with communication_cpus(env):
                dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
        # Finds the device of this rank, and uses the existing process group.
        state = PartialState(cpu=backend in _CPU_BACKENDS)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{environment.BACKEND}: {backend!r} is not available in this image: {error}") from error
    except RuntimeError as error:
        raise FabricError(f"rank {rank} of {size} could not join the other ranks: {error}") from error
    return World(state.process_index, state.num_processes, max(0, state.local_process_index), state.device)
