"""Flat gradient buffers."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from finetune_trainer.distributed import buckets as module
from finetune_trainer.distributed.buckets import GradientBuckets, assign_buckets
from finetune_trainer.distributed.gradients import Signal
from finetune_trainer.distributed.world import World

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)


@given(sizes=st.lists(st.integers(1, 100), min_size=1, max_size=30), limit=st.integers(1, 120))
def test_every_parameter_has_its_place_in_order(sizes: list[int], limit: int) -> None:
    groups = assign_buckets(sizes, limit)
    assert [index for group in groups for index in group] == list(range(len(sizes)))
    assert all(len(group) == 1 or sum(sizes[index] for index in group) <= limit for group in groups)
    # No two neighbours would have fitted into one.
    for one, following in pairwise(groups):
        assert sum(sizes[index] for index in one) + sizes[following[0]] > limit


@pytest.fixture(name="network", params=[8, 1024])
def _network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setattr(module, "BUCKET_NUMEL", request.param)
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))


def test_backward_adds_into_the_buffers(network: nn.Module) -> None:
    parameters = list(network.parameters())
    buckets = GradientBuckets(parameters, CPU)
    buckets.clear()
    inputs = torch.randn(4, 3)
    for _ in range(2):
        torch.autograd.backward(network(inputs).sum())
    expected = torch.autograd.grad(network(inputs).sum(), parameters)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)
    buckets.clear()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in parameters)


def test_signals_are_no_part_of_the_norm(network: nn.Module) -> None:
    parameters = list(network.parameters())
    buckets = GradientBuckets(parameters, CPU)
    torch.autograd.backward(network(torch.randn(4, 3)).sum())
    buckets.signals[Signal.LOSS] = 1e9
    expected = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
    buckets.reduce(ALONE)
    torch.testing.assert_close(buckets.clip(0.25), expected)
    clipped = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    assert float(torch.linalg.vector_norm(clipped)) == pytest.approx(0.25, rel=1e-5)
    assert float(buckets.signals[Signal.LOSS]) == pytest.approx(1e9)


def test_zero_switches_clipping_off(network: nn.Module) -> None:
    parameters = list(network.parameters())
    buckets = GradientBuckets(parameters, CPU)
    torch.autograd.backward((1000 * network(torch.randn(4, 3))).sum())
    norm = buckets.clip(0)
    torch.testing.assert_close(buckets.clip(0), norm)
