"""Nodes with separate disks: without shared storage, or with a scratch disk in front of it."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch

from finetune_contract import environment, paths
from finetune_contract.exit_codes import ExitCode
from finetune_trainer.checkpoint.snapshot import Committed, Snapshot
from finetune_trainer.checkpoint.store.folder import FolderStore
from finetune_trainer.checkpoint.store.retention import Retention
from finetune_trainer.checkpoint.store.scratch import Drain, ScratchStore
from finetune_trainer.errors import SupersededError
from testing.trainer import tiny
from testing.trainer.ranks import Ranks

SPLIT = {environment.MIN_PART_BYTES: "1"}


def steps(job_dir: Path) -> list[int]:
    found = paths.checkpoints(job_dir)
    return sorted(int(folder.name.split("-")[1]) for folder in found.glob("step-*")) if found.exists() else []


def snapshot(step: int) -> Snapshot:
    return Snapshot(step, {"model": {"w": torch.full((3,), float(step))}}, {"losses": [0.5], "step": step})


def restored(ranks: Ranks) -> int:
    return next(int(report["restoredStep"]) for report in ranks.reports() if "restoredStep" in report)


@pytest.fixture(scope="module")
def expected(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the weights of an uninterrupted run on two ranks."""
    ranks = Ranks(tiny.make_spec(base, data), tmp_path_factory.mktemp("expected") / "job", world_size=2)
    assert ranks.run() == [ExitCode.DONE] * 2, ranks.stderr()
    return ranks.weights()


@pytest.mark.trainer
@pytest.mark.parametrize("empty", [0, 1])
def test_node_with_an_empty_disk_receives_the_checkpoint(
    base: Path, data: Path, tmp_path: Path, expected: bytes, empty: int
) -> None:
    """No disk is shared. Both ranks are killed, and one of them restarts on a new machine."""
    spec = tiny.make_spec(base, data)
    first = Ranks(spec, tmp_path / "job", 1, 2, ("copy", 2), own_disks=True, saves_all=True)
    assert -signal.SIGKILL in first.run()
    newest = max(steps(first.disk(rank) / "job")[-1] for rank in range(2))
    shutil.rmtree(first.disk(empty))
    left = steps(first.disk(1 - empty) / "job")[-1]
    again = Ranks(spec, tmp_path / "job", 2, 2, own_disks=True)
    assert again.run() == [ExitCode.DONE] * 2, again.stderr()
    assert 0 < left == restored(again) <= newest
    assert again.weights() == expected


def scratch_of(ranks: Ranks, rank: int) -> dict[str, str]:
    return {environment.SCRATCH_DIR: str(ranks.folder / f"scratch-{rank}")}


def with_scratch(ranks: Ranks) -> Ranks:
    """Make each rank a node: a separate scratch, and a shared storage."""
    ranks.per_rank = {rank: {**scratch_of(ranks, rank), "LOCAL_RANK": "0"} for rank in range(ranks.world_size)}
    return ranks


@pytest.mark.trainer
@pytest.mark.parametrize("lost", ["no scratch", "all scratch"])
def test_ranks_resume_from_scratch_if_it_exists_and_else_from_the_storage(
    base: Path, data: Path, tmp_path: Path, expected: bytes, lost: str
) -> None:
    spec = tiny.make_spec(base, data)
    # The second save, because a third one may not happen: a save that is due while another one runs is skipped.
    first = with_scratch(Ranks(spec, tmp_path / "job", 1, 2, ("copy", 1), 0))
    assert -signal.SIGKILL in first.run()
    on_scratch = [steps(first.folder / f"scratch-{rank}") for rank in range(2)]
    assert all(on_scratch), on_scratch
    if lost == "all scratch":
        for rank in range(2):
            shutil.rmtree(first.folder / f"scratch-{rank}")
    else:
        # Checkpoints that had not been copied are still on scratch.
        shutil.rmtree(paths.checkpoints(first.job_dir))
    on_storage = max(steps(first.job_dir), default=0)
    again = with_scratch(Ranks(spec, tmp_path / "job", 2, 2))
    assert again.run() == [ExitCode.DONE] * 2, again.stderr()
    assert restored(again) == (on_storage if lost == "all scratch" else max(map(max, on_scratch)))
    assert again.weights() == expected
    # The final checkpoint is on the storage, not only on scratch, and it is the reported one.
    assert steps(again.job_dir)[-1] == 6
    assert again.reports()[-1]["checkpoint"]["step"] == 6


class ScratchHarness:
    """A scratch in front of a durable storage."""

    def __init__(self, tmp_path: Path, attempt: int = 1) -> None:
        self.storage, self.scratch = tmp_path / "storage", tmp_path / "scratch"
        self.durable = FolderStore(self.storage, "uid", attempt, Retention(3))
        self.store = ScratchStore(self.scratch, self.durable, "uid", attempt, reads_durable=True)
        self.store.open()
        self.reported: list[int] = []
        self.drain = Drain(self.store, lambda committed, _: self.reported.append(committed.manifest.step))

    def save(self, step: int) -> Committed:
        committed = self.store.save(snapshot(step), 0)
        self.drain.offer(committed, float(step))
        return committed


def test_storage_receives_a_complete_copy(tmp_path: Path) -> None:
    harness = ScratchHarness(tmp_path)
    harness.save(2)
    harness.drain.wait()
    ended = harness.drain.take_result()
    assert ended is not None
    assert (ended.error, ended.begun_at, harness.reported) == (None, 2.0, [2])
    chosen = FolderStore(harness.storage, "uid", 1, Retention()).choose(pytest.fail)
    assert chosen is not None
    assert harness.durable.load(chosen).tensors["model"]["w"].tolist() == [2.0] * 3


def test_slow_storage_receives_only_the_newest_checkpoint(tmp_path: Path) -> None:
    """Several checkpoints are saved during one copy; only the newest of them is copied next."""
    harness, resume, begun = ScratchHarness(tmp_path), threading.Event(), threading.Event()

    def hold(stage: str) -> None:
        if stage == "check the fence":
            begun.set()
            resume.wait(30)

    harness.durable.on_stage = hold
    harness.save(2)
    assert begun.wait(30)
    for step in (4, 6, 8):
        harness.save(step)
    resume.set()
    harness.drain.wait()
    assert harness.reported == [2, 8]
    assert steps(harness.storage) == [2, 8]
    # The checkpoint that was being copied was not removed before the end of its copy.
    assert steps(harness.scratch) == [2, 6, 8]
    harness.save(10)
    assert steps(harness.scratch) == [8, 10]
    harness.drain.wait()


def test_full_storage_fails_one_copy_and_keeps_no_leftovers(tmp_path: Path) -> None:
    harness = ScratchHarness(tmp_path)

    def full(stage: str) -> None:
        if stage == "write manifest":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    harness.durable.on_stage = full
    harness.save(2)
    harness.drain.wait()
    ended = harness.drain.take_result()
    assert ended is not None
    assert "No space left on device" in str(ended.error)
    assert [entry.name for entry in paths.checkpoints(harness.storage).iterdir()] == []
    harness.durable.on_stage = lambda _: None
    harness.save(4)
    harness.drain.wait()
    assert steps(harness.storage) == [4]


def test_superseded_copy_does_not_count(tmp_path: Path) -> None:
    harness = ScratchHarness(tmp_path)
    FolderStore(harness.storage, "uid", 2, Retention()).open()
    harness.save(2)
    harness.drain.wait()
    ended = harness.drain.take_result()
    assert ended is not None
    assert isinstance(ended.error, SupersededError)
    assert steps(harness.storage) == []


def test_storage_is_used_if_the_scratch_is_damaged(tmp_path: Path) -> None:
    harness = ScratchHarness(tmp_path)
    harness.save(2)
    harness.drain.wait()
    committed = harness.save(4)
    harness.drain.wait()
    for folder in (committed.folder, paths.checkpoints(harness.storage) / committed.folder.name):
        (folder / "model.safetensors").write_bytes(b"")
    warnings: list[str] = []
    chosen = ScratchHarness(tmp_path, attempt=2).store.choose(warnings.append)
    assert chosen is not None
    assert chosen.manifest.step == 2
    assert len(warnings) >= 1
