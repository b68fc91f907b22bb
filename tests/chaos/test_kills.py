"""Short runs of the kill programs: the same checks with fewer kills."""

from __future__ import annotations

import os

import pytest

from testing.measure.process import run_program

pytestmark = pytest.mark.trainer


@pytest.mark.timeout(900)
def test_kill_demo() -> None:
    result = run_program(
        "tests.chaos.kill_demo", "--notices", "1", "--kills", "3", "--steps", "12", "--save-every", "3"
    )
    assert result == {"notices": 1, "kills": 3, "different_weights": 0, "lost_after_notice": 0}


@pytest.mark.timeout(600)
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount small disks and to filter connections")
@pytest.mark.parametrize(
    "cells",
    [
        (
            "recipe: SIGKILL x rank 0 x saving",
            "recipe: full disk x rank 0 x saving",
            "script: SIGKILL x rank 0 x saving",
        ),
        ("recipe: partition x rank 1 x training", "recipe: XID x rank 1 x training"),
    ],
)
def test_kill_matrix(cells: tuple[str, ...]) -> None:
    result = run_program("tests.chaos.kill_matrix", "--no-times", "--cells", *cells)
    assert (result["wrong"], result["cells"]) == (0, len(cells))


@pytest.mark.timeout(600)
def test_hub_faults() -> None:
    result = run_program("tests.chaos.hub_faults", "--jobs", "1", "--rate", "0.2")
    assert (result["jobs"], result["different_weights"], result["failures"]) == (1, 0, 0)
    assert min(result["faults"], result["outages"]) > 0


@pytest.mark.timeout(900)
def test_kill_saves() -> None:
    result = run_program("tests.chaos.kill_saves", "--kills", "8")
    assert result == {"kills": 8, "different_weights": 0, "corrupt_chosen": 0}


@pytest.mark.timeout(900)
def test_kill_scripts() -> None:
    result = run_program("tests.chaos.kill_scripts", "--notices", "2", "--kills", "2")
    assert result == {"kills": 2, "notices": 2, "different_weights": 0, "lost_after_notice": 0}
