"""Short runs of the long checks: the same programs with fewer rounds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from testing.measure.process import run_program


@pytest.mark.trainer
@pytest.mark.timeout(900)
def test_bench_checkpoint() -> None:
    """Check only that it measures: on a busy machine, the values mean nothing."""
    result = run_program("bench.checkpoint", "--width", "32", "--rounds", "1", "--no-limit")
    assert set(result) == {"stall_ratio_full", "stall_ratio_lora", "durable_over_raw_write"}
    assert all(value > 0 for value in result.values())


@pytest.mark.trainer
@pytest.mark.skipif(os.geteuid() != 0 or len(os.sched_getaffinity(0)) < 2, reason="needs root and two cores")
def test_bench_exchange() -> None:
    """Check only that it measures: on a busy machine, the shares mean nothing."""
    options = ("--rounds", "1", "--channels", "32", "--latent", "8", "--links", "10g", "--methods", "full")
    result = run_program("bench.exchange", *options, "--compute", "accelerator", "cpu")
    assert result.keys() == {"full_10g_accelerator", "full_10g_cpu", "different_bits"}
    assert result["different_bits"] == 0


def test_bench_spot(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("seconds,node,notice_seconds\n900,1,120\n1500,0,0\n", encoding="utf-8")
    result = run_program("bench.spot", "--hours", "0.5", "--nodes", "4", "--trace", str(trace))
    assert result.keys() == {"none", "upstream", "ours"}
    assert 0 < max(result["none"], result["upstream"]) < result["ours"] <= 1


@pytest.mark.cluster
def test_bench_operator() -> None:
    result = run_program("bench.operator", "--jobs", "4", "--nodes-per-job", "2", "--idle-seconds", "5")
    measured = {
        *(
            "create_rate_ratio",
            "create_rate_ratio_same_objects",
            "recover_seconds",
            "recover_seconds_bare",
            "recover_seconds_busy",
        ),
        *("rss_mib", "requests_per_job"),
        *("cpu_ms_per_job", "recover_cpu_ms_per_job", "total_cpu_ms_per_job", "recover_total_cpu_ms_per_job"),
    }
    assert {key: value for key, value in result.items() if key not in measured} == {
        "jobs": 4,
        "pods": 8,
        "extra_attempts": 0,
        "idle_writes_per_minute": 0.0,
    }
    assert measured <= result.keys()


@pytest.mark.cluster
def test_bench_beats() -> None:
    result = run_program("bench.beats", "--jobs", "2", "--nodes-per-job", "2", "--seconds", "5")
    assert result["supervisors"] == 4
    # The rate is rounded, and 0 for only four supervisors. A latency is measured only if heartbeats are answered.
    assert result["p99_ms"] > 0
    assert result["rss_mib"] > 0
    assert {"beats_per_second", "cores", "writes_per_second"} < result.keys()
