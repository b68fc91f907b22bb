"""Gradients of complete parameters: in flat buffers, and where autograd puts them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from finetune_trainer.distributed import buckets as module
from finetune_trainer.distributed.buckets import GradientBuckets, assign_buckets
from finetune_trainer.distributed.gradients import Gradients, Signal, clip_factor
from finetune_trainer.distributed.local import LocalGradients
from finetune_trainer.distributed.world import World

BuildGradients = Callable[[list[nn.Parameter]], Gradients]
CPU = torch.device("cpu")
SINGLE_RANK = World(0, 1, 0, CPU)


@given(sizes=st.lists(st.integers(1, 100), min_size=1, max_size=30), limit=st.integers(1, 120))
def test_every_parameter_is_in_one_bucket_in_order(sizes: list[int], limit: int) -> None:
    groups = assign_buckets(sizes, limit)
    assert [index for group in groups for index in group] == list(range(len(sizes)))
    assert all(len(group) == 1 or sum(sizes[index] for index in group) <= limit for group in groups)
    # No bucket could hold the first parameter of the next one.
    for one, following in pairwise(groups):
        assert sum(sizes[index] for index in one) + sizes[following[0]] > limit


@pytest.fixture(name="network", params=[8, 1024])
def _network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setattr(module, "BUCKET_NUMEL", request.param)
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))


@pytest.fixture(name="make", params=["buckets", "local"])
def _make(request: pytest.FixtureRequest) -> BuildGradients:
    makers: dict[str, BuildGradients] = {
        "buckets": lambda parameters: GradientBuckets(parameters, SINGLE_RANK),
        "local": lambda parameters: LocalGradients(parameters, CPU),
    }
    return makers[request.param]


def test_passes_of_a_step_are_summed(network: nn.Module, make: BuildGradients) -> None:
    parameters = list(network.parameters())
    gradients = make(parameters)
    inputs = torch.randn(4, 3)
    expected = torch.autograd.grad(network(inputs).sum(), parameters)
    for num_passes in (2, 1, 3):
        gradients.clear()
        for _ in range(num_passes):
            torch.autograd.backward(network(inputs).sum())
            gradients.signals[Signal.SAMPLES] += 4
        gradients.reduce(SINGLE_RANK)
        for parameter, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.grad, num_passes * gradient)
        assert gradients.signals.tolist() == [0, 4 * num_passes, 0, 0]


def test_clear_drops_earlier_passes(network: nn.Module, make: BuildGradients) -> None:
    parameters = list(network.parameters())
    gradients = make(parameters)
    torch.autograd.backward(network(torch.randn(4, 3)).sum())
    gradients.clear()
    inputs = torch.randn(4, 3)
    torch.autograd.backward(network(inputs).sum())
    gradients.reduce(SINGLE_RANK)
    expected = torch.autograd.grad(network(inputs).sum(), parameters)
    torch.testing.assert_close([parameter.grad for parameter in parameters], list(expected))


def test_parameters_without_backward_have_zero_gradients(network: nn.Module, make: BuildGradients) -> None:
    """The optimizer then still updates them by moments and weight decay, as on ranks whose backward reached them."""
    assert isinstance(network, nn.Sequential)
    gradients = make(list(network.parameters()))
    torch.autograd.backward(network(torch.randn(4, 3)).sum())
    gradients.reduce(SINGLE_RANK)
    gradients.clear()
    torch.autograd.backward(network[0](torch.randn(4, 3)).sum())
    gradients.reduce(SINGLE_RANK)
    for parameter in network[1].parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network[0].parameters())


def test_norm_excludes_signals(network: nn.Module, make: BuildGradients) -> None:
    parameters = list(network.parameters())
    gradients = make(parameters)
    torch.autograd.backward(network(torch.randn(4, 3)).sum())
    gradients.signals[Signal.LOSS] = 1e9
    gradients.reduce(SINGLE_RANK)
    expected = norm_of(parameters)
    torch.testing.assert_close(gradients.norm(), expected)
    gradients.scale(0.25)
    torch.testing.assert_close(norm_of(parameters), 0.25 * expected)
    assert float(gradients.signals[Signal.LOSS]) == pytest.approx(1e9)


def norm_of(parameters: list[nn.Parameter]) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(
        torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
    )
    return norm


@given(norm=st.floats(0, 1e30), max_norm=st.floats(1e-6, 1e6))
def test_a_norm_is_clipped_and_never_increased(norm: float, max_norm: float) -> None:
    factor = clip_factor(norm, max_norm)
    assert factor <= 1
    assert norm * factor <= max_norm * (1 + 1e-12)
    if norm < 0.9 * max_norm - 1e-6:
        assert factor == 1


def test_zero_disables_clipping() -> None:
    assert clip_factor(1e6, 0) == 1
