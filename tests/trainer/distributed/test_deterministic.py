"""What a rank asks of torch so that a run can be repeated."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from finetune_trainer.train.run import be_deterministic


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("device", "expected"), [("cpu", True), ("cuda", False)])
def test_only_on_cpus(device: str, expected: bool) -> None:
    be_deterministic(torch.device(device))
    assert torch.are_deterministic_algorithms_enabled() is expected


def test_new_memory_is_not_written_to() -> None:
    """Torch fills it with NaN otherwise, to show who reads it too early."""
    be_deterministic(torch.device("cpu"))
    assert not any(torch.empty(64, 64).isnan().all() for _ in range(4))
