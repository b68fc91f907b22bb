"""Settings of torch that make a run repeatable."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from finetune_trainer.train.determinism import make_deterministic


@pytest.fixture(autouse=True)
def _reset_torch() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("device", "expected"), [("cpu", True), ("cuda", False)])
def test_deterministic_algorithms_only_on_cpus(device: str, expected: bool) -> None:
    make_deterministic(torch.device(device))
    assert torch.are_deterministic_algorithms_enabled() is expected


def test_new_memory_is_not_filled() -> None:
    """By default torch fills it with NaN in deterministic mode, to reveal reads of uninitialized memory."""
    make_deterministic(torch.device("cpu"))
    assert not any(torch.empty(64, 64).isnan().all() for _ in range(4))
