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

NUM_STREAMS = 2
"""Streams of a GPU: one rounds numbers while the other uses the network."""
MAX_IN_FLIGHT = 4
"""Sums on CPUs that have started to send. Each holds two bf16 copies of its tensor."""


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
        self._streams = [torch.cuda.Stream(world.device) for _ in range(NUM_STREAMS)]  # type: ignore[no-untyped-call]
        self._num_started = 0

    def start(self, tensor: Tensor) -> PendingSum:
        """Start a sum; see `Exchange`."""
        stream = self._streams[self._num_started % NUM_STREAMS]
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

    Three threads each do one step of every sum, in the order of the sums, so that the network is never idle while
    numbers are rounded and added. Each process group is used by one thread only. The order of the collectives is
    therefore the same on all ranks whatever the threads' timing.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        with world.collective("new_group"):
            parts, sums = _new_group(), _new_group()
        self._slots = threading.Semaphore(MAX_IN_FLIGHT)
        receive = _Stage("exchange-receive", lambda item: item.receive())
        add = _Stage("exchange-add", lambda item: item.add(sums), receive)
        self._send = _Stage("exchange-send", lambda item: item.send(parts), add)

    def start(self, tensor: Tensor) -> PendingSum:
        """Start a sum; see `Exchange`."""
        item = _RoundedSum(tensor, self._world, self._slots)
        self._send.put(item)
        return item


class _RoundedSum:
    """One sum of a RoundedExchange, and its steps."""

    def __init__(self, tensor: Tensor, world: World, slots: threading.Semaphore) -> None:
        self._tensor, self._world, self._slots = tensor.view(-1), world, slots
        self._sent = self._received = self._total = torch.empty(0)
        self._work: dist.Work | None = None
        self._done: Future[None] = Future()

    def send(self, group: dist.ProcessGroup) -> None:
        """Round the numbers, and start to send each rank its part."""
        # Limits the memory of sums that wait for the network.
        self._slots.acquire()
        numel, size = self._tensor.numel(), self._world.size
        self._sent = torch.empty(-(-numel // size) * size, dtype=torch.bfloat16)
        self._sent[:numel].copy_(self._tensor)
        self._sent[numel:].zero_()
        self._received = torch.empty_like(self._sent)
        self._work = dist.all_to_all_single(_bytes(self._received), _bytes(self._sent), group=group, async_op=True)

    def add(self, group: dist.ProcessGroup) -> None:
        """Add the parts of all ranks, and start to exchange the sums."""
        self._wait()
        self._total = add_parts(self._received, self._world.size).to(torch.bfloat16)
        self._work = dist.all_gather_into_tensor(_bytes(self._sent), _bytes(self._total), group=group, async_op=True)

    def receive(self) -> None:
        """Copy the sums into the tensor."""
        self._wait()
        self._tensor.copy_(self._sent[: self._tensor.numel()])
        self._end()
        self._done.set_result(None)

    def fail(self, error: BaseException) -> None:
        """End the sum with an error."""
        self._end()
        self._done.set_exception(error)

    def wait(self) -> None:
        """Wait for the sum.

        Raises:
            FabricError: a peer was lost.
        """
        with self._world.collective("all_reduce"):
            self._done.result()

    def _wait(self) -> None:
        assert self._work is not None
        self._work.wait()

    def _end(self) -> None:
        self._sent = self._received = self._total = torch.empty(0)
        self._slots.release()


class _Stage:
    """A thread that does one step of every sum.

    It is a daemon: a rank that leaves because a peer is lost does not wait for it.

    Args:
        name: name of the thread.
        step: the step.
        following: the stage that gets the sum after it.
    """

    def __init__(self, name: str, step: Callable[[_RoundedSum], None], following: _Stage | None = None) -> None:
        self._step, self._following = step, following
        self._items: queue.SimpleQueue[_RoundedSum] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def put(self, item: _RoundedSum) -> None:
        """Do the step of a sum after those of the sums before it."""
        self._items.put(item)

    def _run(self) -> None:
        while True:
            item = self._items.get()
            try:
                with torch.no_grad():
                    self._step(item)
            except BaseException as error:
                item.fail(error)
            else:
                if self._following is not None:
                    self._following.put(item)


def _new_group() -> dist.ProcessGroup:
    """Return a new group of all ranks. All ranks call it."""
    group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    assert isinstance(group, dist.ProcessGroup)
    return group


def scatter_sum(sent: Tensor, size: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the fp32 sum over the ranks, in their order, of this rank's part of a tensor of `size` equal parts.

    Raises:
        RuntimeError: a peer was lost.
    """
    received = torch.empty_like(sent)
    dist.all_to_all_single(_bytes(received), _bytes(sent), group=group)
    return add_parts(received, size)


def add_parts(parts: Tensor, size: int) -> Tensor:
    """Return the fp32 sum of the parts that the ranks have sent, in the order of the ranks."""
    first, *others = parts.view(size, -1).unbind()
    total: Tensor = first.float()
    for other in others:
        total += other
    return total


def _bytes(tensor: Tensor) -> Tensor:
    """Return a view of the bytes, which every version of the backend can send."""
    return tensor.view(torch.uint8)
