"""The exchange on CUDA streams, with stand-ins for the streams and for NCCL: the order of the work, and the numbers.

The stand-ins compute at once and record what real streams would wait for. A GPU is needed to test real streams.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from finetune_contract.spec import ExchangePrecision
from finetune_trainer.distributed.exchange import DirectExchange, StreamExchange, open_exchange
from finetune_trainer.distributed.world import World

NUM_RANKS = 2


class StandIns:
    """Records the work of all streams in the order in which it is queued."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.work: list[str] = []
        self.current = "compute"
        self._num_streams = 0
        monkeypatch.setattr(torch.cuda, "Stream", self._new_stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: StreamStandIn(self, "compute"))
        monkeypatch.setattr(torch.cuda, "stream", self._use)
        monkeypatch.setattr(dist, "all_reduce", self._all_reduce)

    def note(self, what: str) -> None:
        self.work.append(f"{self.current}: {what}")

    def _new_stream(self, device: torch.device) -> StreamStandIn:
        self._num_streams += 1
        return StreamStandIn(self, f"side {self._num_streams}")

    @contextlib.contextmanager
    def _use(self, stream: StreamStandIn) -> Iterator[None]:
        before, self.current = self.current, stream.name
        yield
        self.current = before

    def _all_reduce(self, tensor: Tensor, async_op: bool) -> Any:
        assert async_op
        assert tensor.dtype is torch.bfloat16
        self.note("sum")
        # All ranks have the same numbers.
        tensor.mul_(NUM_RANKS)
        return WorkStandIn(self)


class WorkStandIn:
    """A collective of NCCL."""

    def __init__(self, stand_ins: StandIns) -> None:
        self._stand_ins = stand_ins

    def wait(self) -> None:
        self._stand_ins.note("wait for the sum")


class StreamStandIn:
    """A CUDA stream, and the event at its end."""

    def __init__(self, stand_ins: StandIns, name: str) -> None:
        self._stand_ins, self.name = stand_ins, name

    def wait_stream(self, other: StreamStandIn) -> None:
        self._stand_ins.work.append(f"{self.name}: wait for {other.name}")

    def record_event(self) -> StreamStandIn:
        return self

    def wait(self) -> None:
        self._stand_ins.note(f"wait for {self.name}")


def test_sums_run_beside_the_computation_and_alternate_between_two_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins = StandIns(monkeypatch)
    exchange = StreamExchange(World(0, NUM_RANKS, 0, torch.device("cpu")))
    tensors = [torch.randn(5) for _ in range(3)]
    expected = [NUM_RANKS * tensor.bfloat16().float() for tensor in tensors]
    pending = [exchange.start(tensor) for tensor in tensors]
    started = [
        line
        for side in (1, 2, 1)
        for line in (f"side {side}: wait for compute", f"side {side}: sum", f"side {side}: wait for the sum")
    ]
    assert stand_ins.work == started
    # The computing stream waits for a sum only where its result is used.
    for each in pending:
        each.wait()
    assert stand_ins.work[len(started) :] == [f"compute: wait for side {side}" for side in (1, 2, 1)]
    assert all(map(torch.equal, tensors, expected))


def test_gpus_use_streams_only_for_rounded_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    StandIns(monkeypatch)
    world = World(0, NUM_RANKS, 0, torch.device("cuda"))
    assert isinstance(open_exchange(world, ExchangePrecision.BF16), StreamExchange)
    assert isinstance(open_exchange(world, ExchangePrecision.FP32), DirectExchange)
    alone = World(0, 1, 0, torch.device("cuda"))
    assert isinstance(open_exchange(alone, ExchangePrecision.BF16), DirectExchange)
