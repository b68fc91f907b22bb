"""Sums over the ranks that run while the loop's thread computes. `GradientBuckets` starts one for each full bucket.

An exchange sends fp32 or bf16 numbers. In both cases the order of the additions depends only on the length of the
tensor and the number of ranks, never on the time at which a sum starts.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from finetune_contract.spec import ExchangePrecision
from finetune_contract.timeouts import COLLECTIVE_TIMEOUT
from finetune_trainer.distributed.world import World

NUM_LANES = 2
"""Sums that run at the same time: one rounds and adds numbers while the other uses the network."""


class PendingSum(Protocol):
    """A sum over the ranks that has started. It changes the tensor until `wait` returns."""

    def wait(self) -> None:
        """Wait until the tensor holds the sum; on a GPU, make the current stream wait.

        Raises:
            FabricError: a peer was lost.
        """
        ...


class Exchange(Protocol):
    """A way to sum tensors over the ranks."""

    def start(self, tensor: Tensor) -> PendingSum:
        """Start to sum a contiguous fp32 tensor over all ranks, in place. All ranks start their sums in the same order.

        Args:
            tensor: its values must not change until the sum is complete.

        Raises:
            FabricError: a peer was lost.
        """
        ...


def open_exchange(world: World, precision: ExchangePrecision) -> Exchange:
    """Return the exchange for the ranks' device. All ranks call this at the same time."""
    if precision is ExchangePrecision.FP32 or world.size == 1:
        return DirectExchange(world)
    if world.device.type == "cuda":
        return StreamExchange(world)
    return RoundedExchange(world)


class DirectExchange:
    """Sums of fp32 numbers by the backend. NCCL runs them on a stream of its own, gloo on its own threads."""

    def __init__(self, world: World) -> None:
        self._world = world

    def start(self, tensor: Tensor) -> PendingSum:
        """Start a sum; see `Exchange`."""
        return self._world.start_sum(tensor)


class StreamExchange:
    """Sums of bf16 numbers by NCCL, on two streams beside the one that computes.

    The rounding, the sum and the copy back of one tensor follow each other on one stream. The memory of its bf16 copy
    is therefore free for a later tensor before the last one has started, and the computing stream waits for nothing.
    NCCL computes in fp32 and rounds each partial sum.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._streams = [torch.cuda.Stream(world.device) for _ in range(NUM_LANES)]  # type: ignore[no-untyped-call]
        self._num_started = 0

    def start(self, tensor: Tensor) -> PendingSum:
        """Start a sum; see `Exchange`."""
        stream = self._streams[self._num_started % NUM_LANES]
        self._num_started += 1
        # The gradients in the tensor come from the stream that computes.
        stream.wait_stream(torch.cuda.current_stream(self._world.device))
        with torch.cuda.stream(stream), self._world.collective("all_reduce"):
            sent = tensor.to(torch.bfloat16)
            work = dist.all_reduce(sent, async_op=True)
            assert work is not None
            # Blocks the stream, not this thread.
            work.wait()
            tensor.copy_(sent)
        return _StreamSum(stream.record_event())


class _StreamSum:
    """A sum that is complete when a stream has reached an event."""

    def __init__(self, done: torch.cuda.Event) -> None:
        self._done = done

    def wait(self) -> None:
        """Make the current stream wait for the sum."""
        self._done.wait()


class RoundedExchange:
    """Sums of bf16 numbers on CPUs. Every rank rounds its numbers once, and the sum is rounded once.

    Each rank adds one part of the tensor for all: it receives this part from every rank, adds in fp32 in the order of
    the ranks, and sends the rounded sums to the others. A number's sum does not depend on its place in the tensor. The
    bytes on the network are half of those of an fp32 sum.

    The steps of one sum follow each other in a thread with its own process group, so that the order of the collectives
    is the same on all ranks whatever the threads' timing.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        with world.collective("new_group"):
            self._lanes = [_Lane(_new_group()) for _ in range(NUM_LANES)]
        self._num_started = 0

    def start(self, tensor: Tensor) -> PendingSum:
        """Start a sum; see `Exchange`."""
        lane = self._lanes[self._num_started % NUM_LANES]
        self._num_started += 1
        return _LaneSum(lane.run(lambda: sum_rounded(tensor, self._world.size, lane.group)), self._world)


def _new_group() -> dist.ProcessGroup:
    """Return a new group of all ranks. All ranks call it."""
    group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    assert isinstance(group, dist.ProcessGroup)
    return group


class _Lane:
    """A thread that runs one task after the other, and the process group that only it uses.

    It is a daemon: a rank that leaves because a peer is lost does not wait for it.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self._tasks: queue.SimpleQueue[tuple[Future[None], Callable[[], None]]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="exchange", daemon=True).start()

    def run(self, task: Callable[[], None]) -> Future[None]:
        """Run a task after those before it."""
        future: Future[None] = Future()
        self._tasks.put((future, task))
        return future

    def _run(self) -> None:
        while True:
            future, task = self._tasks.get()
            try:
                task()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)


class _LaneSum:
    """A sum in the thread of a lane."""

    def __init__(self, future: Future[None], world: World) -> None:
        self._future, self._world = future, world

    def wait(self) -> None:
        """Wait for the sum.

        Raises:
            FabricError: a peer was lost.
        """
        with self._world.collective("all_reduce"):
            self._future.result()


@torch.no_grad()
def sum_rounded(tensor: Tensor, size: int, group: dist.ProcessGroup | None = None) -> None:
    """Sum an fp32 tensor over the ranks of a group, in place, with bf16 numbers on the network; see `RoundedExchange`.

    Raises:
        RuntimeError: a peer was lost.
    """
    numel = tensor.numel()
    part = -(-numel // size)
    sent = torch.empty(size * part, dtype=torch.bfloat16)
    sent[:numel].copy_(tensor.view(-1))
    sent[numel:].zero_()
    total = scatter_sum(sent, size, group).to(torch.bfloat16)
    dist.all_gather_into_tensor(_bytes(sent), _bytes(total), group=group)
    tensor.view(-1).copy_(sent[:numel])


def scatter_sum(sent: Tensor, size: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the fp32 sum over the ranks, in their order, of this rank's part of a tensor of `size` equal parts.

    Raises:
        RuntimeError: a peer was lost.
    """
    received = torch.empty_like(sent)
    dist.all_to_all_single(_bytes(received), _bytes(sent), group=group)
    first, *others = received.view(size, -1).unbind()
    total: Tensor = first.float()
    for other in others:
        total += other
    return total


def _bytes(tensor: Tensor) -> Tensor:
    """Return a view of the bytes, which every version of the backend can send."""
    return tensor.view(torch.uint8)
