"""Damage of the state folder never makes the next start fail."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.harness import KEY, PATIENCE_SECONDS, CliHarness

GARBAGE = {
    "empty": b"",
    "truncated": b'{"metadata": {"name": "circ',
    "not text": b"\xff\xfe\x00\x80",
    "another type": b"[1, 2]",
    "null": b"null",
    "another object": b'{"hello": "world"}',
}


pytestmark = pytest.mark.xdist_group("broken-state")
"""One worker interrupts the job once."""


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[CliHarness, Path]]:
    """Yield a harness whose job was interrupted and has a checkpoint, and a copy of its folder."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two ranks need two cores")
    harness = CliHarness(tmp_path_factory.mktemp("job"))
    try:
        harness.set_rank_arguments("--step-seconds", "0.05")
        process = harness.start()
        harness.wait_for_step(12)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 130
        harness.set_rank_arguments()
        copy = tmp_path_factory.mktemp("copy") / "job"
        shutil.copytree(harness.folder, copy)
        yield harness, copy
    finally:
        harness.close()


@pytest.fixture
def stopped(interrupted: tuple[CliHarness, Path]) -> Iterator[CliHarness]:
    """Yield the harness with its folder as it was after the interruption. Assert that the test left no process."""
    harness, copy = interrupted
    shutil.rmtree(harness.folder)
    shutil.copytree(copy, harness.folder)
    yield harness
    remaining = harness.processes()
    harness.close()
    assert remaining == []


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE.keys())
def test_a_broken_job_file_falls_back_to_the_previous_version(stopped: CliHarness, garbage: bytes) -> None:
    path = stopped.home.job(KEY).job
    path.write_bytes(garbage)
    assert KEY.name in stopped.call("get").stderr
    assert stopped.call("describe", KEY.name).returncode == 2
    result = stopped.run()
    assert result.returncode == 0, result.stderr
    assert f"{path} " in result.stderr
    assert "renamed to job.json.broken-1" in result.stderr
    assert path.with_name("job.json.broken-1").read_bytes() == garbage
    # It is still the same job, and it resumed from its checkpoint.
    assert (stopped.status()["attempts"][-1]["fromStep"]) >= 10


def truncate(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(b'{"cut')


def truncate_both_copies(folder: Path) -> None:
    truncate("job.json")(folder)
    truncate("job.json.previous")(folder)


def replace_job_by_folder(folder: Path) -> None:
    (folder / "job.json").unlink()
    (folder / "job.json").mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "events": truncate("events.json"),
    "endpoint": truncate("endpoint.json"),
    "config": truncate("configmaps/circles-run.json"),
    "lock": truncate("lock"),
    "both copies of the job": truncate_both_copies,
    "the job is a folder": replace_job_by_folder,
    "no job": lambda folder: (folder / "job.json").unlink(),
    "no folder": shutil.rmtree,
    "no configs": lambda folder: shutil.rmtree(folder / "configmaps"),
    "a leftover of a write": lambda folder: (folder / ".job.json.new").write_bytes(b'{"cut'),
    "a pod without files": lambda folder: (folder / "pods/circles-a1-n0").mkdir(parents=True),
    "a stray file among the pods": lambda folder: (folder / "pods/x").write_text(""),
    "a stray file among the jobs": lambda folder: (folder.parent / "x").write_text(""),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_the_next_start_works_after_damage(stopped: CliHarness, damage: Callable[[Path], object]) -> None:
    damage(stopped.home.job(KEY).path)
    assert stopped.call("get").returncode == 0
    result = stopped.run()
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert stopped.saved_step() == 40
    assert stopped.call("describe", KEY.name).returncode == 0
    assert stopped.call("delete", KEY.name).returncode == 0


def test_a_home_that_is_a_file_is_refused(harness: CliHarness) -> None:
    harness.home.path.write_text("")
    result = harness.run()
    assert result.returncode == 2
    assert result.stderr.startswith(f"finetune: --home: {harness.home.path} cannot be created or used")
    assert len(result.stderr.splitlines()) == 1
