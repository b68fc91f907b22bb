"""The checkpointer: background saves, storage errors, retention, and the format of the files."""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from finetune_contract import paths
from finetune_contract.spec import CheckpointInterval
from finetune_trainer.checkpoint.checkpointer import Checkpointer, SaveOptions
from finetune_trainer.checkpoint.host_copy import SMALL_NUMEL, HostCopy
from finetune_trainer.checkpoint.snapshot import BEST, Snapshot
from finetune_trainer.checkpoint.split import file_name, group_of, num_parts, take_part
from finetune_trainer.checkpoint.state import TrainState
from finetune_trainer.checkpoint.store import tensor_stream
from finetune_trainer.checkpoint.store.folder import FolderStore
from finetune_trainer.checkpoint.store.retention import Retention, removable
from finetune_trainer.checkpoint.store.scratch import ScratchStore
from finetune_trainer.checkpoint.store.tensor_stream import write_stream
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import StaleError, SupersededError
from finetune_trainer.pauses import Pause, sleep
from finetune_trainer.report import Reporter
from testing.trainer import tiny

CPU = torch.device("cpu")


class ManualClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class LoopHarness:
    """A loop of one rank that only changes the state, with a store whose stages a test can delay or fail."""

    def __init__(
        self, job_dir: Path, max_stale_seconds: float = 100.0, scratch: Path | None = None, pause: Pause = sleep
    ) -> None:
        self.state = make_state()
        self.clock = ManualClock()
        self.on_stage: Callable[[str], None] = lambda _: None
        self.reporter = Reporter(0, None)
        spec = tiny.make_spec(Path("base"), Path("data")).model_copy(
            update={"checkpoint_interval": CheckpointInterval(steps=1), "max_stale_seconds": max_stale_seconds}
        )
        store: FolderStore = FolderStore(job_dir, spec.uid, 1, Retention(keep=2), self._stage)
        if scratch is not None:
            # `on_stage` receives the stages of the durable storage.
            store = ScratchStore(scratch, store, spec.uid, 1, reads_durable=True)
        options = SaveOptions(clock=self.clock, pause=pause)
        self.checkpointer = Checkpointer(spec, World(0, 1, 0, CPU), store, self.reporter, options)
        self.checkpointer.restore(self.state)

    def _stage(self, stage: str) -> None:
        self.on_stage(stage)

    def step(self) -> None:
        due = self.checkpointer.due(self.state.step + 1)
        self.checkpointer.before_update()
        with self.state.updating():
            for parameter in self.state.parameters.values():
                parameter.data.add_(1.0)
            self.state.step += 1
        if due:
            self.checkpointer.save(self.state)

    def settle(self) -> None:
        """Wait for the running save."""
        assert self.checkpointer._task is not None
        self.checkpointer._task.future.exception()

    @property
    def error(self) -> str:
        return self.reporter._report.checkpoint_error or ""


class ObservedEvent(threading.Event):
    """An event that shows whether a thread waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waited_for = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.waited_for.set()
        return super().wait(timeout)


def make_state() -> TrainState:
    parameters = {"w": nn.Parameter(torch.zeros(SMALL_NUMEL + 1)), "b": nn.Parameter(torch.zeros(3))}
    return TrainState(parameters, torch.optim.SGD(parameters.values(), lr=0.1))


def names(job_dir: Path) -> list[str]:
    return sorted(entry.name for entry in paths.checkpoints(job_dir).iterdir())


def full(stage: str) -> None:
    if stage == "write model":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")


def test_training_continues_while_a_save_is_written(tmp_path: Path) -> None:
    """The save is delayed after its copy while ten steps change the state; it still holds the state of its step."""
    harness, held, resume = LoopHarness(tmp_path), threading.Event(), threading.Event()

    def hold(stage: str) -> None:
        if stage.startswith("write model"):
            held.set()
            resume.wait(30)

    harness.on_stage = hold
    for _ in range(11):
        harness.step()
    assert held.wait(30)
    assert names(tmp_path) == [".writing-step-00000001-a1"]
    resume.set()
    harness.settle()
    saved = load_file(paths.checkpoints(tmp_path) / "step-00000001-a1" / "model.safetensors")
    assert set(saved["w"].tolist()) == {1.0}
    assert saved["b"].tolist() == [1.0] * 3
    # The next save starts only when the last one has ended, and then at once.
    harness.step()
    harness.settle()
    assert names(tmp_path) == ["step-00000001-a1", "step-00000012-a1"]


def test_state_changes_only_after_the_copy(tmp_path: Path) -> None:
    harness, resume = LoopHarness(tmp_path), threading.Event()
    harness.on_stage = lambda stage: (resume.wait(30), None)[1] if stage == "copy" else None
    harness.step()
    task = harness.checkpointer._task
    assert task is not None
    task.copied = copied = ObservedEvent()
    stepping = threading.Thread(target=harness.step)
    stepping.start()
    assert copied.waited_for.wait(30)
    assert harness.state.step == 1
    resume.set()
    stepping.join()
    harness.settle()
    saved = load_file(paths.checkpoints(tmp_path) / "step-00000001-a1" / "model.safetensors")
    assert saved["b"].tolist() == [1.0] * 3


def test_full_disk_stops_training_only_at_the_staleness_limit(tmp_path: Path) -> None:
    harness = LoopHarness(tmp_path, max_stale_seconds=100)
    harness.step()
    harness.settle()
    harness.on_stage = full
    harness.step()
    harness.settle()
    harness.step()
    assert "No space left on device" in harness.error
    # The incomplete checkpoint is removed, because it would keep the disk full.
    assert names(tmp_path) == ["step-00000001-a1"]
    harness.clock.now = 90
    harness.step()
    harness.settle()
    harness.step()
    harness.clock.now = 101
    with pytest.raises(StaleError, match=re.escape("no checkpoint for 100 s (spec.checkpoint.maxStale)")):
        harness.step()


def test_saves_succeed_again_when_the_disk_has_space(tmp_path: Path) -> None:
    harness = LoopHarness(tmp_path)
    harness.on_stage = full
    harness.step()
    harness.settle()
    harness.step()
    assert harness.error
    harness.on_stage = lambda _: None
    harness.step()
    assert names(tmp_path) == []
    harness.clock.now = 3
    harness.step()
    harness.settle()
    assert names(tmp_path) == [f"step-{harness.state.step:08d}-a1"]
    harness.step()
    assert harness.error == ""


def test_stale_nfs_handle_fails_one_save_only(tmp_path: Path) -> None:
    harness, stages = LoopHarness(tmp_path), iter([OSError(errno.ESTALE, os.strerror(errno.ESTALE))])

    def stale(stage: str) -> None:
        if stage == "rename" and (error := next(stages, None)):
            raise error

    harness.on_stage = stale
    assert not harness.checkpointer.try_to_save(advance(harness))
    assert harness.checkpointer.try_to_save(harness.state)
    assert names(tmp_path) == ["step-00000001-a1"]


def advance(harness: LoopHarness) -> TrainState:
    harness.step()
    return harness.state


def test_required_save_is_retried_until_the_staleness_limit(tmp_path: Path) -> None:
    harness = LoopHarness(tmp_path, max_stale_seconds=0.5)
    harness.on_stage = full
    with pytest.raises(StaleError, match="No space left"):
        harness.checkpointer.save_and_wait(advance(harness))


def test_slow_disk_is_reported(tmp_path: Path) -> None:
    harness, resume = LoopHarness(tmp_path, max_stale_seconds=1000), threading.Event()
    harness.on_stage = lambda stage: (resume.wait(30), None)[1] if stage == "write model" else None
    harness.step()
    harness.clock.now = 130
    harness.step()
    assert "the save of step 1 is not done after 120 s" in harness.error
    harness.clock.now = 1001
    with pytest.raises(StaleError, match=r"spec\.checkpoint\.maxStale"):
        harness.step()
    resume.set()


def test_hanging_durable_storage_behind_a_scratch_is_reported(tmp_path: Path) -> None:
    """Saves to the scratch continue, but a checkpoint on the scratch alone does not count as safe."""
    harness, held, resume = (
        LoopHarness(tmp_path / "job", 1000, scratch=tmp_path / "scratch"),
        threading.Event(),
        threading.Event(),
    )

    def hold(stage: str) -> None:
        if stage == "check the fence":
            held.set()
            resume.wait(30)

    harness.on_stage = hold
    harness.step()
    # The save ends before its copy starts, because another thread copies.
    assert held.wait(30)
    harness.settle()
    harness.clock.now = 130
    harness.step()
    harness.settle()
    assert "the save of step 1 is not done after 120 s" in harness.error
    assert names(tmp_path / "scratch")[-1] == "step-00000002-a1"
    harness.clock.now = 1001
    with pytest.raises(StaleError, match=r"spec\.checkpoint\.maxStale"):
        harness.step()
    resume.set()


def test_superseded_save_ends_the_loop(tmp_path: Path) -> None:
    harness = LoopHarness(tmp_path)
    harness.step()
    harness.settle()
    FolderStore(tmp_path, tiny.make_spec(Path("b"), Path("d")).uid, 2, Retention()).open()
    harness.step()
    harness.settle()
    with pytest.raises(SupersededError):
        harness.step()


SHAPES = st.sampled_from([(), (0,), (3,), (2, 3), (1, 1, 5)])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float16])


@given(
    st.dictionaries(
        st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=4), st.tuples(SHAPES, DTYPES)
    )
)
def test_streams_are_valid_safetensors_files(
    tmp_path_factory: pytest.TempPathFactory, kinds: dict[str, tuple[tuple[int, ...], torch.dtype]]
) -> None:
    tensors = {name: torch.ones(shape).to(dtype) for name, (shape, dtype) in kinds.items()}
    path = tmp_path_factory.mktemp("stream") / "x.safetensors"
    entry = write_stream(path, tensors)
    assert entry.size_bytes == path.stat().st_size
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype is tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_streams_write_strided_and_large_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors with strides and tensors larger than a chunk, with early flushes."""
    monkeypatch.setattr(tensor_stream, "FLUSH_BYTES", tensor_stream.CHUNK_BYTES // 2)
    large = torch.arange(5_000_000, dtype=torch.float32)
    tensors = {
        "large": large,
        "across": large[:6].view(2, 3).t(),
        "last": large.view(2, 2, 5, -1)[:1].to(memory_format=torch.channels_last),
    }
    write_stream(tmp_path / "x.safetensors", tensors)
    loaded = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_host_buffers_are_reused() -> None:
    copy, parameter = HostCopy(CPU), torch.zeros(SMALL_NUMEL + 1)
    first = copy.copy({"model": {"w": parameter, "small": parameter[:3]}})["model"]
    parameter.fill_(2.0)
    assert set(first["w"].tolist()) == {0.0}
    assert first["small"].tolist() == [0.0] * 3
    second = copy.copy({"model": {"w": parameter, "small": parameter[:3]}})["model"]
    assert second["w"].data_ptr() == first["w"].data_ptr()
    assert set(second["w"].tolist()) == {2.0}


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.integers(1, 5))
@example([1, 0], 1)
@example([0, 0], 2)
def test_every_tensor_is_in_exactly_one_part(sizes: list[int], parts: int) -> None:
    groups = {"model": {str(number): torch.zeros(size, dtype=torch.uint8) for number, size in enumerate(sizes)}}
    taken = [take_part(groups, part, parts).get("model", {}) for part in range(parts)]
    assert sorted(name for part in taken for name in part) == sorted(groups["model"])
    even = sum(sizes) / parts
    assert all(sum(value.numel() for value in part.values()) <= even + max(sizes) for part in taken)


def test_small_states_are_not_split() -> None:
    assert [num_parts(size, 4, 100) for size in (0, 99, 199, 200, 350, 10**6)] == [1, 1, 1, 2, 3, 4]
    assert group_of(file_name("model", 0, 1)) == group_of(file_name("model", 1, 3)) == "model"
    assert group_of("state.json") is None


STEPS = [(step, 1) for step in (10, 20, 30, 40, 50)]


@pytest.mark.parametrize(
    ("retention", "best", "removed"),
    [
        (Retention(keep=1), None, [50, 40, 30, 20, 10]),
        (Retention(keep=3), None, [30, 20, 10]),
        (Retention(keep=10), None, []),
        (Retention(keep=1, every_steps=20), None, [50, 30, 10]),
        (Retention(keep=1, every_steps=25), None, [40, 20, 10]),
        (Retention(keep=1, best=True), 20, [50, 40, 30, 10]),
        (Retention(keep=1, best=True), None, [50, 40, 30, 20, 10]),
        (Retention(keep=1, best=False), 20, [50, 40, 30, 20, 10]),
    ],
)
def test_retention_removes_older_checkpoints(retention: Retention, best: int | None, removed: list[int]) -> None:
    assert [step for step, _ in removable([*STEPS, (60, 1)], (60, 1), retention, best)] == removed


def test_best_checkpoint_is_kept(tmp_path: Path) -> None:
    store = FolderStore(tmp_path, "uid", 1, Retention(keep=1, best=True))
    store.open()
    for step in (1, 2, 3):
        values = {BEST: {"step": 2 if step > 1 else 1, "loss": 1 / step}}
        store.save(Snapshot(step, {"model": {"w": torch.ones(1)}}, values), 0)
    assert names(tmp_path) == ["step-00000002-a1", "step-00000003-a1"]


def test_newer_checkpoints_are_not_removed() -> None:
    assert removable([(10, 1), (20, 1), (30, 1)], (20, 2), Retention(keep=1), None) == [(20, 1), (10, 1)]


def test_checkpoint_of_format_1_can_be_restored(tmp_path: Path) -> None:
    """Format 1: one file for each group, and a manifest without its own hash."""
    harness = LoopHarness(tmp_path / "new")
    harness.checkpointer.save_and_wait(advance(harness))
    (folder,) = paths.checkpoints(tmp_path / "new").iterdir()
    manifest = folder / "manifest.json"
    text = manifest.read_text().replace('"format_version": 2', '"format_version": 1')
    manifest.write_text(re.sub(r',\s*"sha256": "[0-9a-f]+"\s*}\s*$', "}", text))
    again = LoopHarness(tmp_path / "new")
    assert again.state.step == 1
    assert again.state.parameters["b"].tolist() == [1.0] * 3


def test_a_single_rank_saves_the_last_step_if_the_next_one_cannot_be_read(tmp_path: Path) -> None:
    harness = LoopHarness(tmp_path)
    harness.step()
    harness.settle()
    harness.state.step = 5
    harness.checkpointer.emergency_save(harness.state)
    assert names(tmp_path)[-1] == "step-00000005-a1"


def test_notice_ends_the_pause_of_a_required_save(tmp_path: Path) -> None:
    """The save is tried until it succeeds: the machine may stay longer than announced."""
    pauses: list[float] = []

    def pause(seconds: float) -> bool:
        pauses.append(seconds)
        if len(pauses) == 12:
            harness.on_stage = lambda _: None
        return len(pauses) > 9

    harness = LoopHarness(tmp_path, pause=pause)
    harness.on_stage = full
    harness.checkpointer.save_and_wait(advance(harness))
    # Pauses of 1, 2, 4 and 8 s, which the notice ends, and then short ones.
    assert pauses == [1.0] * 12
    assert names(tmp_path) == ["step-00000001-a1"]
