"""The just-in-time checkpoint: sudden death of a replica loses no step where a survivor holds the state."""

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
    """Nothing is saved before the end unless somebody dies."""
    interval = {"checkpoint_interval": CheckpointInterval(steps=10**6)}
    return tiny.make_spec(base, data, steps=STEPS, ema=True, lora={"rank": 2, "dropout": 0.1}).model_copy(
        update=interval
    )


@pytest.fixture(name="undisturbed", scope="module")
def _undisturbed(spec: RunSpec, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], bytes]:
    """Weights of the undisturbed run on so many ranks."""
    weights: dict[int, bytes] = {}
    folder = tmp_path_factory.mktemp("undisturbed")

    def run(world_size: int) -> bytes:
        if world_size not in weights:
            ranks = Ranks(spec, folder / str(world_size), world_size=world_size)
            assert ranks.run() == [ExitCode.DONE] * world_size, ranks.stderr()
            weights[world_size] = ranks.weights()
        return weights[world_size]

    return run


def last_step(ranks: Ranks) -> int:
    """The newest step that any rank has told of."""
    told: list[int] = [report.get("step", 0) for rank in range(ranks.world_size) for report in ranks.reports(rank)]
    return max(told)


@pytest.mark.trainer
@pytest.mark.parametrize(("world_size", "seed"), [(2, 0), (2, 1), (3, 2), (3, 3)])
def test_sudden_death_of_one_loses_no_step(
    spec: RunSpec, undisturbed: Callable[[int], bytes], world_size: int, seed: int, tmp_path: Path
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
    assert following.weights() == undisturbed(world_size)


@pytest.mark.trainer
@pytest.mark.parametrize("stage", ["copy", "write optimizer", "read back", "rename", "prune"])
def test_sudden_death_of_one_inside_a_split_save(
    spec: RunSpec, undisturbed: Callable[[int], bytes], stage: str, tmp_path: Path
) -> None:
    """The survivor does not wait for the part of the dead one."""
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
    assert following.weights() == undisturbed(2)


@pytest.mark.trainer
def test_a_peer_that_hangs_is_left_behind(spec: RunSpec, undisturbed: Callable[[int], bytes], tmp_path: Path) -> None:
    """The collective never ends; the word that the peer is gone comes from outside."""
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
    assert following.weights() == undisturbed(2)


def make_state(step: int) -> TrainState:
    parameters = {"w": nn.Parameter(torch.full((3,), float(step)))}
    return TrainState(parameters, torch.optim.SGD(parameters.values(), lr=0.1), step=step)


def make_rescue(job_dir: Path, rank: int) -> tuple[EmergencySave, FolderStore, list[Committed]]:
    store = FolderStore(job_dir, "uid", 1, Retention())
    reported: list[Committed] = []
    return (
        EmergencySave(rank, store, Reporter(rank, None), lambda state: state.snapshot({}), reported.append),
        store,
        reported,
    )


def names(job_dir: Path) -> list[str]:
    return sorted(entry.name for entry in paths.checkpoints(job_dir).iterdir() if not entry.name.startswith("."))


def test_one_survivor_writes_and_the_others_are_content(tmp_path: Path) -> None:
    one, store, by_one = make_rescue(tmp_path, 1)
    other, _, by_other = make_rescue(tmp_path, 2)
    store.open()
    one.run(make_state(7), None)
    other.run(make_state(7), None)
    assert names(tmp_path) == ["step-00000007-a1"]
    assert [committed.manifest.step for committed in by_one] == [7]
    assert by_other == []


def test_a_survivor_that_dies_is_replaced(tmp_path: Path) -> None:
    """Somebody has claimed the step, and nothing comes of it."""
    one, store, by_one = make_rescue(tmp_path, 1)
    store.open()
    assert store.claim(7)
    one.run(make_state(7), None, claim_seconds=0.1)
    assert names(tmp_path) == ["step-00000007-a1"]
    assert len(by_one) == 1


def test_survivors_of_two_steps(tmp_path: Path) -> None:
    """One had finished the step in which the peer died, the other had not: the newer one is there in any case."""
    one, store, _ = make_rescue(tmp_path, 1)
    other, _, _ = make_rescue(tmp_path, 2)
    store.open()
    one.run(make_state(7), None)
    other.run(make_state(8), None)
    assert names(tmp_path) == ["step-00000007-a1", "step-00000008-a1"]


def test_nothing_is_written_of_a_state_that_broke_off(tmp_path: Path) -> None:
    rescue, store, _ = make_rescue(tmp_path, 1)
    store.open()
    state = make_state(7)
    with pytest.raises(KeyboardInterrupt), state.updating():
        raise KeyboardInterrupt
    rescue.run(state, None)
    assert names(tmp_path) == []


def test_an_update_is_waited_for_and_none_comes_behind(tmp_path: Path) -> None:
    rescue, store, reported = make_rescue(tmp_path, 1)
    store.open()
    state = make_state(7)
    begun, go_on = threading.Event(), threading.Event()

    def update() -> None:
        with state.updating():
            begun.set()
            go_on.wait(10)
            state.step = 8

    loop = threading.Thread(target=update)
    loop.start()
    begun.wait(10)
    side = threading.Thread(target=rescue.run, args=(state, None))
    side.start()
    go_on.set()
    loop.join()
    side.join()
    assert [committed.manifest.step for committed in reported] == [8]
    assert not state.whole.acquire(blocking=False)


def test_a_superseded_survivor_writes_nothing(tmp_path: Path) -> None:
    rescue, store, reported = make_rescue(tmp_path, 1)
    store.open()
    FolderStore(tmp_path, "uid", 2, Retention()).open()
    rescue.run(make_state(7), None)
    assert reported == []
    assert names(tmp_path) == []
