"""Nodes with disks of their own: nothing is shared, or a scratch disk stands before what is."""

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
def truth(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of two ranks that nobody disturbs."""
    ranks = Ranks(tiny.make_spec(base, data), tmp_path_factory.mktemp("truth") / "job", world_size=2)
    assert ranks.run() == [ExitCode.DONE] * 2, ranks.stderr()
    return ranks.weights()


@pytest.mark.trainer
@pytest.mark.parametrize("empty", [0, 1])
def test_a_node_with_an_empty_disk_is_given_the_checkpoint(
    base: Path, data: Path, tmp_path: Path, truth: bytes, empty: int
) -> None:
    """No disk is shared; both die, and one of them comes back on a new machine."""
    spec = tiny.make_spec(base, data)
    first = Ranks(spec, tmp_path / "job", 1, 2, ("copy", 2), own_disks=True, saves_all=True)
    assert -signal.SIGKILL in first.run()
    newest = max(steps(first.disk(rank) / "job")[-1] for rank in range(2))
    shutil.rmtree(first.disk(empty))
    left = steps(first.disk(1 - empty) / "job")[-1]
    again = Ranks(spec, tmp_path / "job", 2, 2, own_disks=True)
    assert again.run() == [ExitCode.DONE] * 2, again.stderr()
    assert 0 < left == restored(again) <= newest
    assert again.weights() == truth


def scratch_of(ranks: Ranks, rank: int) -> dict[str, str]:
    return {environment.SCRATCH_DIR: str(ranks.folder / f"scratch-{rank}")}


def with_scratch(ranks: Ranks) -> Ranks:
    """Each rank is a node: a scratch of its own, the storage shared."""
    ranks.per_rank = {rank: {**scratch_of(ranks, rank), "LOCAL_RANK": "0"} for rank in range(ranks.world_size)}
    return ranks


@pytest.mark.trainer
@pytest.mark.parametrize("lost", ["no scratch", "all scratch"])
def test_ranks_go_on_from_scratch_where_it_is_there_and_else_from_the_storage(
    base: Path, data: Path, tmp_path: Path, truth: bytes, lost: str
) -> None:
    spec = tiny.make_spec(base, data)
    first = with_scratch(Ranks(spec, tmp_path / "job", 1, 2, ("copy", 2), 0))
    first.run()
    on_scratch = [steps(first.folder / f"scratch-{rank}") for rank in range(2)]
    assert all(on_scratch), on_scratch
    if lost == "all scratch":
        for rank in range(2):
            shutil.rmtree(first.folder / f"scratch-{rank}")
    else:
        # What had not got behind is on scratch still.
        shutil.rmtree(paths.checkpoints(first.job_dir))
    behind = max(steps(first.job_dir), default=0)
    again = with_scratch(Ranks(spec, tmp_path / "job", 2, 2))
    assert again.run() == [ExitCode.DONE] * 2, again.stderr()
    assert restored(again) == (behind if lost == "all scratch" else max(map(max, on_scratch)))
    assert again.weights() == truth
    # The end of a run is on the storage, not on scratch alone, and that is what was told.
    assert steps(again.job_dir)[-1] == 6
    assert again.reports()[-1]["checkpoint"]["step"] == 6


class Bed:
    """A scratch before a storage."""

    def __init__(self, tmp_path: Path, attempt: int = 1) -> None:
        self.storage, self.scratch = tmp_path / "storage", tmp_path / "scratch"
        self.behind = FolderStore(self.storage, "uid", attempt, Retention(3))
        self.store = ScratchStore(self.scratch, self.behind, "uid", attempt, reads_behind=True)
        self.store.open()
        self.told: list[int] = []
        self.drain = Drain(self.store, lambda committed, _: self.told.append(committed.manifest.step))

    def save(self, step: int) -> Committed:
        committed = self.store.save(snapshot(step), 0)
        self.drain.offer(committed, float(step))
        return committed


def test_the_storage_gets_a_whole_copy(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    bed.save(2)
    bed.drain.wait()
    ended = bed.drain.take_end()
    assert ended is not None
    assert (ended.error, ended.begun_at, bed.told) == (None, 2.0, [2])
    chosen = FolderStore(bed.storage, "uid", 1, Retention()).choose(pytest.fail)
    assert chosen is not None
    assert bed.behind.load(chosen).tensors["model"]["w"].tolist() == [2.0] * 3


def test_a_slow_storage_is_passed_over(tmp_path: Path) -> None:
    """While one is copied others come; of those only the newest is copied."""
    bed, go_on, begun = Bed(tmp_path), threading.Event(), threading.Event()

    def hold(stage: str) -> None:
        if stage == "check the fence":
            begun.set()
            go_on.wait(30)

    bed.behind.on_stage = hold
    bed.save(2)
    assert begun.wait(30)
    for step in (4, 6, 8):
        bed.save(step)
    go_on.set()
    bed.drain.wait()
    assert bed.told == [2, 8]
    assert steps(bed.storage) == [2, 8]
    # What was being copied stayed until it was behind.
    assert steps(bed.scratch) == [2, 6, 8]
    bed.save(10)
    assert steps(bed.scratch) == [8, 10]
    bed.drain.wait()


def test_a_full_storage_is_one_failed_copy_and_leaves_nothing_behind(tmp_path: Path) -> None:
    bed = Bed(tmp_path)

    def full(stage: str) -> None:
        if stage == "write manifest":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    bed.behind.on_stage = full
    bed.save(2)
    bed.drain.wait()
    ended = bed.drain.take_end()
    assert ended is not None
    assert "No space left on device" in str(ended.error)
    assert [entry.name for entry in paths.checkpoints(bed.storage).iterdir()] == []
    bed.behind.on_stage = lambda _: None
    bed.save(4)
    bed.drain.wait()
    assert steps(bed.storage) == [4]


def test_a_superseded_copy_does_not_count(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    FolderStore(bed.storage, "uid", 2, Retention()).open()
    bed.save(2)
    bed.drain.wait()
    ended = bed.drain.take_end()
    assert ended is not None
    assert isinstance(ended.error, SupersededError)
    assert steps(bed.storage) == []


def test_a_damaged_scratch_gives_way_to_the_storage(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    bed.save(2)
    bed.drain.wait()
    committed = bed.save(4)
    bed.drain.wait()
    for folder in (committed.folder, paths.checkpoints(bed.storage) / committed.folder.name):
        (folder / "model.safetensors").write_bytes(b"")
    warnings: list[str] = []
    chosen = Bed(tmp_path, attempt=2).store.choose(warnings.append)
    assert chosen is not None
    assert chosen.manifest.step == 2
    assert len(warnings) >= 1
