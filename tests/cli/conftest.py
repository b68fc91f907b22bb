from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.harness import Bed


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    """A job of two fake ranks. Whatever the test did, nothing of it may be left running."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two ranks want two cores")
    bed = Bed(tmp_path)
    try:
        yield bed
    finally:
        left = bed.processes()
        bed.close()
    assert left == []
