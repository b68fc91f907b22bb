from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.harness import CliHarness


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[CliHarness]:
    """Yield a harness with a job of two fake ranks. Assert afterwards that no process of the test still runs."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two ranks need two cores")
    harness = CliHarness(tmp_path)
    try:
        yield harness
    finally:
        remaining = harness.processes()
        harness.close()
    assert remaining == []
