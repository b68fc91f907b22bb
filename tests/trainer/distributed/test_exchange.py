"""The exchange of gradients during the backward pass, on three real ranks."""

from __future__ import annotations

import copy
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from finetune_trainer.distributed import buckets as module
from finetune_trainer.distributed.buckets import GradientBuckets
from finetune_trainer.distributed.gradients import Signal
from finetune_trainer.distributed.world import World
from testing.trainer.exchange import run_on_ranks

WIDTH = 7
NUM_LAYERS = 5
BUCKET_NUMEL = 2 * (WIDTH * WIDTH + WIDTH)
"""Two layers to a bucket."""


class Exchanged(NamedTuple):
    """What one rank has after a step."""

    gradients: list[Tensor]
    signals: list[float]
    started_early: int
    """Number of sums that started during the backward pass."""


def build_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(NUM_LAYERS)))


def inputs_of(world: World, number: int) -> Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(10 * world.rank + number))


def exchange(world: World, overlap: bool, fault: str = "", wire: torch.dtype = torch.float32) -> Exchanged:
    """Run one step with two passes on every rank.

    Args:
        world: the ranks.
        overlap: whether sums start during the last backward pass.
        fault: "unused": the last pass of rank 1 does not reach the third layer. "repeat": rank 1 drops its passes
            after the last one and repeats them.
        wire: type of the numbers that are sent.
    """
    network = build_network()
    with mock.patch.object(module, "BUCKET_NUMEL", BUCKET_NUMEL):
        gradients = GradientBuckets(list(network.parameters()), world, wire, overlap)
    is_faulty = world.rank == 1

    def run_passes() -> None:
        torch.autograd.backward(network(inputs_of(world, 0)).square().sum())
        gradients.expect_last_pass()
        last = nn.Sequential(*network[:2], *network[3:]) if fault == "unused" and is_faulty else network
        torch.autograd.backward(last(inputs_of(world, 1)).square().sum())
        gradients.signals[Signal.SAMPLES] += 6

    with mock.patch.object(World, "start_sum", autospec=True, side_effect=World.start_sum) as start_sum:
        run_passes()
        started = start_sum.call_count
    if fault == "repeat" and is_faulty:
        gradients.drop_passes()
        run_passes()
    gradients.reduce(world)
    values = [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]
    return Exchanged(values, gradients.signals.tolist(), started)


def exchange_all(world: World) -> dict[str, Exchanged]:
    """Run all cases in one world, because a new world takes seconds."""
    return {
        "after": exchange(world, overlap=False),
        "during": exchange(world, overlap=True),
        "unused": exchange(world, overlap=True, fault="unused"),
        "unused, after": exchange(world, overlap=False, fault="unused"),
        "repeat": exchange(world, overlap=True, fault="repeat"),
        "bfloat16": exchange(world, overlap=True, wire=torch.bfloat16),
        "again": exchange(world, overlap=True),
    }


@pytest.fixture(name="ranks", scope="module")
def _ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Exchanged]]:
    return run_on_ranks(3, tmp_path_factory.mktemp("exchange") / "store", exchange_all)


def assert_same_bits(one: Exchanged, other: Exchanged) -> None:
    assert one.signals == other.signals
    assert all(torch.equal(a, b) for a, b in zip(one.gradients, other.gradients, strict=True))


def expected() -> list[Tensor]:
    """Return the sum of the gradients of all passes of all ranks, in double precision."""
    network = copy.deepcopy(build_network()).double()
    for rank in range(3):
        for number in range(2):
            world = World(rank, 3, 0, torch.device("cpu"))
            torch.autograd.backward(network(inputs_of(world, number).double()).square().sum())
    return [parameter.grad.float() for parameter in network.parameters() if parameter.grad is not None]


def test_sums_during_the_backward_pass_have_the_same_bits(ranks: list[dict[str, Exchanged]]) -> None:
    for rank in ranks:
        assert_same_bits(rank["during"], rank["after"])
        assert_same_bits(rank["during"], rank["again"])
        assert_same_bits(rank["during"], ranks[0]["during"])
        torch.testing.assert_close(rank["during"].gradients, expected(), rtol=1e-5, atol=1e-5)
        assert rank["during"].signals == [0, 18, 0, 0]


def test_every_bucket_starts_during_the_last_pass(ranks: list[dict[str, Exchanged]]) -> None:
    num_buckets = -(-NUM_LAYERS // 2)
    assert [rank["during"].started_early for rank in ranks] == [num_buckets] * 3
    assert [rank["after"].started_early for rank in ranks] == [0] * 3


def test_a_layer_that_one_rank_does_not_reach_delays_only_the_buckets_after_it(
    ranks: list[dict[str, Exchanged]],
) -> None:
    assert [rank["unused"].started_early for rank in ranks] == [3, 1, 3]
    for rank in ranks:
        assert_same_bits(rank["unused"], rank["unused, after"])
        assert_same_bits(rank["unused"], ranks[0]["unused"])


def test_repeated_passes_count_once(ranks: list[dict[str, Exchanged]]) -> None:
    """Rank 1 runs out of memory at the end of its last pass, when the sums of all buckets have started."""
    for rank in ranks:
        assert_same_bits(rank["repeat"], rank["during"])


def test_numbers_can_be_sent_as_bfloat16(ranks: list[dict[str, Exchanged]]) -> None:
    for rank in ranks:
        torch.testing.assert_close(rank["bfloat16"].gradients, expected(), rtol=2e-2, atol=2e-1)
        assert not all(map(torch.equal, rank["bfloat16"].gradients, rank["during"].gradients))
        assert rank["bfloat16"].signals == rank["during"].signals
        assert_same_bits(rank["bfloat16"], ranks[0]["bfloat16"])


def test_a_gradient_after_its_sum_has_started_is_an_error() -> None:
    network = build_network()
    gradients = GradientBuckets(list(network.parameters()), World(0, 1, 0, torch.device("cpu")))
    gradients.expect_last_pass()
    torch.autograd.backward(network(torch.ones(1, WIDTH)).sum())
    with pytest.raises(RuntimeError, match="twice in the last pass"):
        torch.autograd.backward(network(torch.ones(1, WIDTH)).sum())
