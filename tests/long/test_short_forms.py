"""Short runs of the long checks: the same programs with fewer rounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_program(*command: str) -> dict[str, Any]:
    """Run a program and return the JSON object of its last line."""
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answer


@pytest.mark.trainer
@pytest.mark.timeout(900)
def test_kill_demo() -> None:
    result = run_program(
        "tests.chaos.kill_demo", "--notices", "1", "--kills", "3", "--steps", "12", "--save-every", "3"
    )
    assert result == {"notices": 1, "kills": 3, "different_weights": 0, "lost_after_notice": 0}


@pytest.mark.trainer
@pytest.mark.timeout(600)
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts small disks and puts filters on connections")
@pytest.mark.parametrize(
    "cells",
    [
        ("--faults", "SIGKILL", "full disk", "--ranks", "rank 0", "--stages", "saving"),
        ("--faults", "partition", "--ranks", "rank 1", "--stages", "training"),
    ],
)
def test_kill_matrix(cells: tuple[str, ...]) -> None:
    result = run_program("tests.chaos.kill_matrix", "--no-times", *cells)
    assert (result["wrong"], result["cells"]) == (0, 2 if "SIGKILL" in cells else 1)


@pytest.mark.trainer
@pytest.mark.timeout(900)
def test_kill_saves() -> None:
    assert run_program("tests.chaos.kill_saves", "--kills", "8") == {
        "kills": 8,
        "different_weights": 0,
        "corrupt_chosen": 0,
    }


@pytest.mark.trainer
@pytest.mark.timeout(900)
def test_bench_checkpoint() -> None:
    """Check only that it measures: on a busy machine, the values mean nothing."""
    result = run_program("bench.checkpoint", "--width", "32", "--rounds", "1", "--no-limit")
    assert set(result) == {"stall_ratio_full", "stall_ratio_lora", "durable_over_raw_write"}
    assert all(value > 0 for value in result.values())


def test_bench_spot(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("seconds,node,notice_seconds\n900,1,120\n1500,0,0\n", encoding="utf-8")
    result = run_program("bench.spot", "--hours", "0.5", "--nodes", "4", "--trace", str(trace))
    assert result.keys() == {"none", "upstream", "ours"}
    assert 0 < max(result["none"], result["upstream"]) < result["ours"] <= 1


@pytest.mark.cluster
def test_bench_operator() -> None:
    result = run_program("bench.operator", "--jobs", "4", "--nodes-per-job", "2", "--idle-seconds", "5")
    measured = {"create_rate_ratio", "recover_seconds", "rss_mib", "requests_per_job"}
    assert {key: value for key, value in result.items() if key not in measured} == {
        "jobs": 4,
        "pods": 8,
        "idle_writes_per_minute": 0.0,
    }
    assert measured <= result.keys()


@pytest.mark.cluster
def test_bench_beats() -> None:
    result = run_program("bench.beats", "--jobs", "2", "--nodes-per-job", "2", "--seconds", "5")
    assert result["supervisors"] == 4
    assert result["beats_per_second"] >= 0
    assert {"cores", "p99_ms", "rss_mib", "writes_per_second"} < result.keys()
