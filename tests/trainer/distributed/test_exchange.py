"""The exchange of gradients during the backward pass, on three real ranks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from finetune_contract.spec import ExchangePrecision
from finetune_trainer.distributed import buckets as module
from finetune_trainer.distributed import exchange as exchange_module
from finetune_trainer.distributed.buckets import GradientBucket, GradientBuckets
from finetune_trainer.distributed.exchange import RoundedExchange
from finetune_trainer.distributed.gradients import Signal
from finetune_trainer.distributed.sharding import ShardedGradients, Shards
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import FabricError
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


def make_buckets(
    parameters: Sequence[nn.Parameter],
    world: World,
    precision: ExchangePrecision = ExchangePrecision.FP32,
    overlap: bool = True,
) -> GradientBuckets:
    with mock.patch.object(module, "BUCKET_NUMEL", BUCKET_NUMEL):
        return GradientBuckets(parameters, world, precision, overlap)


def exchange(
    world: World, overlap: bool, fault: str = "", precision: ExchangePrecision = ExchangePrecision.FP32
) -> Exchanged:
    """Run one step with two passes on every rank.

    Args:
        world: the ranks.
        overlap: whether sums start during the last backward pass.
        fault: "unused": the last pass of rank 1 does not reach the third layer. "repeat": rank 1 drops its passes
            after the last one and repeats them.
        precision: format of the numbers that are sent.
    """
    network = build_network()
    gradients = make_buckets(list(network.parameters()), world, precision, overlap)
    is_faulty = world.rank == 1

    def run_passes() -> None:
        torch.autograd.backward(network(inputs_of(world, 0)).square().sum())
        gradients.expect_last_pass()
        last = nn.Sequential(*network[:2], *network[3:]) if fault == "unused" and is_faulty else network
        torch.autograd.backward(last(inputs_of(world, 1)).square().sum())
        gradients.signals[Signal.SAMPLES] += 6

    with count_started() as start_sum:
        run_passes()
        started = start_sum.call_count
    if fault == "repeat" and is_faulty:
        gradients.drop_passes()
        run_passes()
    gradients.reduce(world)
    values = [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]
    return Exchanged(values, gradients.signals.tolist(), started)


def count_started() -> AbstractContextManager[mock.Mock]:
    """Count the buckets whose sums start in a block."""
    return mock.patch.object(GradientBucket, "start_sum", autospec=True, side_effect=GradientBucket.start_sum)


def exchange_out_of_order(world: World) -> list[tuple[list[int], list[Tensor]]]:
    """Run two steps of a model whose middle layer has the last parameters.

    Returns:
        For each step: the sizes of the buckets in the order of their starts, and the gradients.
    """
    network = build_network()
    parameters = [parameter for number in (0, 1, 3, 4, 2) for parameter in network[number].parameters()]
    gradients = make_buckets(parameters, world)
    steps = []
    for _ in range(2):
        gradients.clear()
        gradients.expect_last_pass()
        with count_started() as start_sum:
            torch.autograd.backward(network(inputs_of(world, 0)).square().sum())
            sizes = [call.args[0].gradients.numel() for call in start_sum.call_args_list]
        gradients.reduce(world)
        steps.append((sizes, [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]))
    return steps


def exchange_slices(world: World) -> list[Tensor]:
    """Return the sums of the slices of this rank, sent as bf16."""
    network = build_network()
    shards = Shards([network], dict(network.named_parameters()), world, precision=ExchangePrecision.BF16)
    gradients = ShardedGradients(shards, world)
    torch.autograd.backward(network(inputs_of(world, 0)).square().sum())
    gradients.reduce(world)
    return [slice_.grad for slice_ in shards.parameters.values() if slice_.grad is not None]


class Results(NamedTuple):
    """What one rank has found."""

    steps: dict[str, Exchanged]
    out_of_order: list[tuple[list[int], list[Tensor]]]
    slices: list[Tensor]


def exchange_all(world: World) -> Results:
    """Run all cases in one world, because a new world takes seconds."""
    return Results(exchange_steps(world), exchange_out_of_order(world), exchange_slices(world))


def exchange_steps(world: World) -> dict[str, Exchanged]:
    return {
        "after": exchange(world, overlap=False),
        "during": exchange(world, overlap=True),
        "unused": exchange(world, overlap=True, fault="unused"),
        "unused, after": exchange(world, overlap=False, fault="unused"),
        "repeat": exchange(world, overlap=True, fault="repeat"),
        "bf16": exchange(world, overlap=True, precision=ExchangePrecision.BF16),
        "bf16, after": exchange(world, overlap=False, precision=ExchangePrecision.BF16),
        "bf16, repeat": exchange(world, overlap=True, fault="repeat", precision=ExchangePrecision.BF16),
        "again": exchange(world, overlap=True),
    }


@pytest.fixture(name="results", scope="module")
def _results(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    return run_on_ranks(3, tmp_path_factory.mktemp("exchange") / "store", exchange_all)


@pytest.fixture(name="ranks", scope="module")
def _ranks(results: list[Results]) -> list[dict[str, Exchanged]]:
    return [rank.steps for rank in results]


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


def own_gradients(rank: int, num_passes: int = 2) -> list[Tensor]:
    """Return the sum of a rank's own passes, in the order of the loop."""
    network = build_network()
    for number in range(num_passes):
        world = World(rank, 3, 0, torch.device("cpu"))
        torch.autograd.backward(network(inputs_of(world, number)).square().sum())
    return [parameter.grad for parameter in network.parameters() if parameter.grad is not None]


def rounded_sums(num_passes: int) -> list[Tensor]:
    """Return the sums over the ranks of numbers that are rounded to bf16 before and after the additions in fp32."""
    by_rank = [[gradient.bfloat16().float() for gradient in own_gradients(rank, num_passes)] for rank in range(3)]
    return [((first + second) + third).bfloat16().float() for first, second, third in zip(*by_rank, strict=True)]


def test_bf16_rounds_each_gradient_once_and_adds_in_fp32_in_the_order_of_the_ranks(
    ranks: list[dict[str, Exchanged]],
) -> None:
    sums = rounded_sums(num_passes=2)
    for rank in ranks:
        assert all(map(torch.equal, rank["bf16"].gradients, sums))
        assert not all(map(torch.equal, rank["bf16"].gradients, rank["during"].gradients))
        assert rank["bf16"].signals == rank["during"].signals


def test_bf16_sums_do_not_depend_on_their_time(ranks: list[dict[str, Exchanged]]) -> None:
    for rank in ranks:
        assert rank["bf16"].started_early == 3
        assert_same_bits(rank["bf16"], rank["bf16, after"])
        assert_same_bits(rank["bf16"], rank["bf16, repeat"])


def test_slices_can_be_sent_as_bf16(results: list[Results]) -> None:
    sums = rounded_sums(num_passes=1)
    for number, result in enumerate(results):
        slices = [total.chunk(3)[number] for total in sums]
        assert len(result.slices) == len(slices) and all(map(torch.equal, result.slices, slices))


def test_buckets_start_in_the_order_of_the_backward_pass_from_the_second_step(results: list[Results]) -> None:
    layer = WIDTH * WIDTH + WIDTH
    for result in results:
        (first_sizes, first), (second_sizes, second) = result.out_of_order
        # By the parameters' order, the middle layer is the first to start, and the two layers after it wait.
        assert first_sizes == [layer, 2 * layer, 2 * layer]
        assert second_sizes == [2 * layer, layer, 2 * layer]
        assert all(map(torch.equal, first, second))


def test_a_lost_peer_ends_the_wait_for_a_rounded_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum runs in another thread; the loop's thread gets the error, and the next sums do not hang."""

    def lose_peer(*_: object, **__: object) -> None:
        raise RuntimeError("Connection closed by peer [10.0.0.2]:4711")

    monkeypatch.setattr(exchange_module, "_new_group", lambda: None)
    monkeypatch.setattr(dist, "all_to_all_single", lose_peer)
    sums = RoundedExchange(World(0, 2, 0, torch.device("cpu")))
    pending = [sums.start(torch.zeros(3)) for _ in range(exchange_module.MAX_IN_FLIGHT + 1)]
    for each in pending:
        with pytest.raises(FabricError, match="rank 0 lost a peer in all_reduce: Connection closed by peer"):
            each.wait()


def test_a_gradient_after_its_sum_has_started_is_an_error() -> None:
    network = build_network()
    gradients = GradientBuckets(list(network.parameters()), World(0, 1, 0, torch.device("cpu")))
    gradients.expect_last_pass()
    torch.autograd.backward(network(torch.ones(1, WIDTH)).sum())
    with pytest.raises(RuntimeError, match="twice in the last pass"):
        torch.autograd.backward(network(torch.ones(1, WIDTH)).sum())
