"""`finetune logs`: selection of attempts and ranks, and --follow."""

from __future__ import annotations

import signal
import subprocess

from finetune_operator.cli.commands.logs import make_line_filter
from tests.cli.harness import FINETUNE, KEY, PATIENCE_SECONDS, CliHarness


def test_logs_of_attempts_and_ranks(harness: CliHarness) -> None:
    assert harness.run("--preempt", "rank=1,at-step=15").returncode == 0
    newest = harness.call("logs", KEY.name).stdout
    assert "[rank 0] rank 0 of attempt 2 is up" in newest
    assert "[rank 1] rank 1 of attempt 2 is up" in newest
    first = harness.call("logs", KEY.name, "--attempt", "1", "--rank", "1").stdout
    assert "rank 1 of attempt 1 is up" in first
    assert "rank 0 of" not in first
    missing = harness.call("logs", KEY.name, "--attempt", "9")
    assert missing.returncode == 2
    assert "its attempts: 1, 2" in missing.stderr


def test_follow_prints_until_the_job_stops_running(harness: CliHarness) -> None:
    harness.set_rank_arguments("--step-seconds", "0.02")
    process = harness.start("--preempt", "rank=1,at-step=20")
    harness.wait_for_step(1)
    command = [FINETUNE, "logs", "-f", KEY.name, "--attempt", "1", "--home", str(harness.home.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as follower:
        output, _ = follower.communicate(timeout=PATIENCE_SECONDS)
    process.communicate(timeout=PATIENCE_SECONDS)
    assert "rank 1 of attempt 1 is up" in output
    assert "rank 1 of attempt 2 is up" in output
    assert "rank 0 ended: done" in output


def test_follow_of_a_stopped_job_exits_at_once(harness: CliHarness) -> None:
    harness.set_rank_arguments("--steps", "100000")
    process = harness.start()
    harness.wait_for_step(1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE_SECONDS)
    assert "is up" in harness.call("logs", "-f", KEY.name).stdout


def test_line_filter_selects_one_rank_of_a_pod() -> None:
    is_shown = make_line_filter(1, per_pod=2)
    assert [is_shown(line) for line in ("[rank 0] a", "[rank 1] b", "[rank 11] c", "[supervisor] d")] == [
        False,
        True,
        False,
        True,
    ]
