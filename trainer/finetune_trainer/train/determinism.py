"""Deterministic algorithms: the same run gives the same bytes."""

from __future__ import annotations

import torch


def make_deterministic(device: torch.device) -> None:
    """On CPUs, allow only algorithms that give the same result each time."""
    torch.use_deterministic_algorithms(device.type == "cpu")
    # By default torch then fills all new memory, to reveal reads of uninitialized values. That is one more pass over
    # every activation and gradient.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
