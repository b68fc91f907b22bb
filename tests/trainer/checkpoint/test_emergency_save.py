"""The emergency save: the loss of a replica loses no step if a survivor holds the state."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from finetune_contract import environment, paths
from finetune_contract.exit_codes import ExitCode
from finetune_contract.run_spec import RunSpec
from finetune_contract.spec import CheckpointInterval
from finetune_trainer.checkpoint.emergency_save import EmergencySave
from finetune_trainer.checkpoint.snapshot import Committed
from finetune_trainer.checkpoint.state import TrainState
from finetune_trainer.checkpoint.store.folder import FolderStore
from finetune_trainer.checkpoint.store.retention import Retention
from finetune_trainer.report import Reporter
from testing.trainer import tiny
from testing.trainer.ranks import Ranks

STEPS = 30
SPLIT = {environment.MIN_PART_BYTES: "1"}


@pytest.fixture(name="spec", scope="module")
def _spec(base: Path, data: Path) -> RunSpec:
    """Return a run that saves nothing before its end unless a rank is lost."""
    interval = {"checkpoint_interval": CheckpointInterval(steps=10**6)}
    return tiny.make_spec(base, data, steps=STEPS, ema=True, lora={"rank": 2, "dropout": 0.1}).model_copy(
        update=interval
    )


@pytest.fixture(name="uninterrupted", scope="module")
def _uninterrupted(spec: RunSpec, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], bytes]:
    """Return a function that gives the weights of the uninterrupted run on a number of ranks."""
    weights: dict[int, bytes] = {}
    folder = tmp_path_factory.mktemp("uninterrupted")

    def run(world_size: int) -> bytes:
        if world_size not in weights:
            ranks = Ranks(spec, folder / str(world_size), world_size=world_size)
            assert ranks.run() == [ExitCode.DONE] * world_size, ranks.stderr()
            weights[world_size] = ranks.weights()
        return weights[world_size]

    return run


def last_step(ranks: Ranks) -> int:
    """Return the newest step that any rank has reported."""
    reported: list[int] = [report.get("step", 0) for rank in range(ranks.world_size) for report in ranks.reports(rank)]
    return max(reported)


@pytest.mark.trainer
@pytest.mark.parametrize(("world_size", "seed"), [(2, 0), (2, 1), (3, 2), (3, 3)])
def test_killed_rank_loses_no_step(
    spec: RunSpec, uninterrupted: Callable[[int], bytes], world_size: int, seed: int, tmp_path: Path
) -> None:
    choice = random.Random(seed)
    victim, step = choice.randrange(world_size), choice.randrange(1, STEPS - 8)
    ranks = Ranks(spec, tmp_path / "job", world_size=world_size, extra=SPLIT).start()
    ranks.wait_until(lambda report: report.get("step", -1) >= step, victim)
    ranks.send(signal.SIGKILL, victim)
    codes = ranks.wait()
    assert [code for rank, code in enumerate(codes) if rank != victim] == [ExitCode.FABRIC] * (world_size - 1)
    following = Ranks(spec, tmp_path / "job", 2, world_size)
    assert following.run() == [ExitCode.DONE] * world_size, following.stderr()
    restored = next(report["restoredStep"] for report in following.reports() if "restoredStep" in report)
    assert restored >= last_step(ranks) >= step
    assert following.weights() == uninterrupted(world_size)


@pytest.mark.trainer
@pytest.mark.parametrize("stage", ["copy", "write optimizer", "read back", "rename", "prune"])
def test_killed_rank_during_a_split_save_loses_no_step(
    spec: RunSpec, uninterrupted: Callable[[int], bytes], stage: str, tmp_path: Path
) -> None:
    """The survivor does not wait for the part of the killed rank."""
    saving = spec.model_copy(update={"checkpoint_interval": CheckpointInterval(steps=3)})
    victim = 1 if stage in ("copy", "write optimizer") else 0
    ranks = Ranks(saving, tmp_path / "job", world_size=2, extra=SPLIT, kill_at=(stage, 2), kill_rank=victim)
    codes = ranks.run()
    assert codes[victim] == -signal.SIGKILL, ranks.stderr()
    assert codes[1 - victim] == ExitCode.FABRIC
    following = Ranks(saving, tmp_path / "job", 2, 2, extra=SPLIT)
    assert following.run() == [ExitCode.DONE] * 2, following.stderr()
    restored = next(report["restoredStep"] for report in following.reports() if "restoredStep" in report)
    assert restored >= last_step(ranks)
    assert following.weights() == uninterrupted(2)


@pytest.mark.trainer
def test_emergency_save_while_a_peer_hangs(
    spec: RunSpec, uninterrupted: Callable[[int], bytes], tmp_path: Path
) -> None:
    """The collective never ends; a signal reports that the peer is lost."""
    ranks = Ranks(spec, tmp_path / "job", world_size=2).start()
    ranks.wait_until(lambda report: report.get("step", -1) >= 5, 1)
    ranks.send(signal.SIGSTOP, 1)
    ranks.send(signal.SIGUSR2, 0)
    ranks.processes[0].join(60)
    ranks.send(signal.SIGKILL, 1)
    assert ranks.wait() == [ExitCode.FABRIC, -signal.SIGKILL], ranks.stderr()
    following = Ranks(spec, tmp_path / "job", 2, 2)
    assert following.run() == [ExitCode.DONE] * 2, following.stderr()
    restored = next(report["restoredStep"] for report in following.reports() if "restoredStep" in report)
    assert restored >= last_step(ranks)
    assert following.weights() == uninterrupted(2)


@pytest.mark.trainer
def test_notice_during_an_outage_loses_no_step(base: Path, tmp_path: Path) -> None:
    """The images of the next step cannot be read: the notice ends the wait, and the last step is saved."""
    # Random crops of images that are not square: they are read in training.
    data = tiny.write_data(tmp_path / "data", size=(2 * tiny.RESOLUTION, tiny.RESOLUTION))
    spec = tiny.make_spec(base, data, steps=10**6, centerCrop=False).model_copy(
        update={"checkpoint_interval": CheckpointInterval(steps=10**6)}
    )
    ranks = Ranks(spec, tmp_path / "run").start()
    ranks.wait_until(lambda report: report.get("step", -1) >= 2)
    broken = tmp_path / "broken"
    for image in (data / "train").glob("[0-9]*.png"):
        # A real file whose read fails with EIO.
        broken.symlink_to("/proc/self/mem")
        broken.replace(image)
    ranks.wait_until(lambda report: "try 3" in str(report.get("detail")))
    ranks.send(signal.SIGTERM, 0)
    assert ranks.wait() == [ExitCode.STORAGE_OUTAGE], ranks.stderr()
    assert names(ranks.job_dir) == [f"step-{last_step(ranks):08d}-a1"]


def make_state(step: int) -> TrainState:
    parameters = {"w": nn.Parameter(torch.full((3,), float(step)))}
    return TrainState(parameters, torch.optim.SGD(parameters.values(), lr=0.1), step=step)


def make_emergency_save(job_dir: Path, rank: int) -> tuple[EmergencySave, FolderStore, list[Committed]]:
    store = FolderStore(job_dir, "uid", 1, Retention())
    reported: list[Committed] = []
    return (
        EmergencySave(rank, store, Reporter(rank, None), lambda state: state.snapshot({}), reported.append),
        store,
        reported,
    )


def names(job_dir: Path) -> list[str]:
    return sorted(entry.name for entry in paths.checkpoints(job_dir).iterdir() if not entry.name.startswith("."))


def test_only_one_survivor_writes(tmp_path: Path) -> None:
    one, store, by_one = make_emergency_save(tmp_path, 1)
    other, _, by_other = make_emergency_save(tmp_path, 2)
    store.open()
    one.run(make_state(7), None)
    other.run(make_state(7), None)
    assert names(tmp_path) == ["step-00000007-a1"]
    assert [committed.manifest.step for committed in by_one] == [7]
    assert by_other == []


def test_survivor_writes_if_the_claiming_rank_does_not(tmp_path: Path) -> None:
    """Another rank has claimed the step but commits nothing."""
    one, store, by_one = make_emergency_save(tmp_path, 1)
    store.open()
    assert store.claim(7)
    one.run(make_state(7), None, claim_seconds=0.1)
    assert names(tmp_path) == ["step-00000007-a1"]
    assert len(by_one) == 1


def test_survivors_at_different_steps_both_save(tmp_path: Path) -> None:
    """Only one survivor had finished the step in which the peer was lost: the newer step is saved in any case."""
    one, store, _ = make_emergency_save(tmp_path, 1)
    other, _, _ = make_emergency_save(tmp_path, 2)
    store.open()
    one.run(make_state(7), None)
    other.run(make_state(8), None)
    assert names(tmp_path) == ["step-00000007-a1", "step-00000008-a1"]


def test_state_of_a_failed_update_is_not_saved(tmp_path: Path) -> None:
    emergency_save, store, _ = make_emergency_save(tmp_path, 1)
    store.open()
    state = make_state(7)
    with pytest.raises(KeyboardInterrupt), state.updating():
        raise KeyboardInterrupt
    emergency_save.run(state, None)
    assert names(tmp_path) == []


def test_emergency_save_waits_for_an_update_and_blocks_the_next_one(tmp_path: Path) -> None:
    emergency_save, store, reported = make_emergency_save(tmp_path, 1)
    store.open()
    state = make_state(7)
    begun, resume = threading.Event(), threading.Event()

    def update() -> None:
        with state.updating():
            begun.set()
            resume.wait(10)
            state.step = 8

    loop = threading.Thread(target=update)
    loop.start()
    assert begun.wait(10)
    side = threading.Thread(target=emergency_save.run, args=(state, None))
    side.start()
    resume.set()
    loop.join()
    side.join()
    assert [committed.manifest.step for committed in reported] == [8]
    assert not state.update_lock.acquire(blocking=False)


def test_superseded_survivor_writes_nothing(tmp_path: Path) -> None:
    emergency_save, store, reported = make_emergency_save(tmp_path, 1)
    store.open()
    FolderStore(tmp_path, "uid", 2, Retention()).open()
    emergency_save.run(make_state(7), None)
    assert reported == []
    assert names(tmp_path) == []
