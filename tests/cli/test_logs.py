"""`finetune logs`."""

from __future__ import annotations

import signal
import subprocess

from finetune_operator.cli.commands.logs import line_filter
from tests.cli.harness import FINETUNE, KEY, PATIENCE_SECONDS, Bed


def test_logs_of_attempts_and_ranks(bed: Bed) -> None:
    assert bed.run("--preempt", "rank=1,at-step=15").returncode == 0
    newest = bed.call("logs", KEY.name).stdout
    assert "[rank 0] rank 0 of attempt 2 is up" in newest
    assert "[rank 1] rank 1 of attempt 2 is up" in newest
    first = bed.call("logs", KEY.name, "--attempt", "1", "--rank", "1").stdout
    assert "rank 1 of attempt 1 is up" in first
    assert "rank 0 of" not in first
    missing = bed.call("logs", KEY.name, "--attempt", "9")
    assert missing.returncode == 2
    assert "its attempts: 1, 2" in missing.stderr


def test_follow_goes_on_until_nobody_runs_the_job(bed: Bed) -> None:
    bed.ranks("--step-seconds", "0.02")
    process = bed.start("--preempt", "rank=1,at-step=20")
    bed.until_step(1)
    command = [FINETUNE, "logs", "-f", KEY.name, "--attempt", "1", "--home", str(bed.home.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as follower:
        output, _ = follower.communicate(timeout=PATIENCE_SECONDS)
    process.communicate(timeout=PATIENCE_SECONDS)
    assert "rank 1 of attempt 1 is up" in output
    assert "rank 1 of attempt 2 is up" in output
    assert "rank 0 ended: done" in output


def test_follow_of_a_stopped_job_ends_at_once(bed: Bed) -> None:
    bed.ranks("--steps", "100000")
    process = bed.start()
    bed.until_step(1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE_SECONDS)
    assert "is up" in bed.call("logs", "-f", KEY.name).stdout


def test_lines_of_one_rank_of_several_in_a_pod() -> None:
    wanted = line_filter(1, per_pod=2)
    assert [wanted(line) for line in ("[rank 0] a", "[rank 1] b", "[rank 11] c", "[supervisor] d")] == [
        False,
        True,
        False,
        True,
    ]
