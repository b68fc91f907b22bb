"""Checkpoints in a folder: commit, verification, choice of the newest, removal of old ones, and the fence."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_contract import paths
from finetune_contract.manifest import FORMAT_VERSION, Manifest
from finetune_trainer.checkpoint.snapshot import Committed, Snapshot
from finetune_trainer.checkpoint.split import take_part
from finetune_trainer.checkpoint.store.fence import Fence
from finetune_trainer.checkpoint.store.folder import FolderStore
from finetune_trainer.checkpoint.store.retention import Retention
from finetune_trainer.checkpoint.store.stages import SaveStage
from finetune_trainer.errors import StorageError, SupersededError

UID = "1f0c3a2b"
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


def open_store(
    job_dir: Path, attempt: int = 1, keep: int = 3, on_stage: Callable[[str], None] = lambda _: None
) -> FolderStore:
    store = FolderStore(job_dir, UID, attempt, Retention(keep), on_stage)
    store.open()
    return store


def snapshot(step: int) -> Snapshot:
    tensors = {"model": {"w": torch.full((3,), float(step))}, "optimizer": {"w.exp_avg": torch.ones(3)}}
    return Snapshot(step, tensors, {"losses": [0.5], "step": step})


def names(job_dir: Path) -> list[str]:
    return sorted(entry.name for entry in paths.checkpoints(job_dir).iterdir())


def choose(job_dir: Path, attempt: int = 9) -> tuple[Committed | None, list[str]]:
    warnings: list[str] = []
    return open_store(job_dir, attempt).choose(warnings.append), warnings


def test_saved_checkpoint_is_restored(tmp_path: Path) -> None:
    committed = open_store(tmp_path, attempt=2).save(snapshot(40), 12.5)
    assert committed.folder.name == "step-00000040-a2"
    assert sorted(entry.name for entry in committed.folder.iterdir()) == sorted([*FILES, "manifest.json"])
    manifest = json.loads((committed.folder / "manifest.json").read_text())
    assert (manifest["job_uid"], manifest["attempt"], manifest["step"], manifest["time"]) == (UID, 2, 40, 12.5)
    chosen, warnings = choose(tmp_path)
    assert warnings == []
    assert chosen == committed
    loaded = open_store(tmp_path, attempt=9).load(committed)
    assert loaded.step == 40
    assert loaded.values == {"losses": [0.5], "step": 40}
    assert loaded.tensors["model"]["w"].tolist() == [40.0] * 3


def test_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert choose(tmp_path) == (None, [])


def test_newest_step_is_chosen_and_then_the_newest_attempt(tmp_path: Path) -> None:
    open_store(tmp_path, attempt=1).save(snapshot(10), 0)
    open_store(tmp_path, attempt=2).save(snapshot(10), 0)
    open_store(tmp_path, attempt=3).save(snapshot(9), 0)
    chosen, _ = choose(tmp_path)
    assert chosen is not None
    assert chosen.folder.name == "step-00000010-a2"


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def _edit_manifest(sealed: bool = True, **changes: Any) -> Callable[[Path], None]:
    def edit(file: Path) -> None:
        text = json.dumps({**json.loads(file.read_text()), **changes})
        file.write_text(Manifest.model_validate_json(text).sealed().model_dump_json() if sealed else text)

    return edit


def _replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES = [
    *[(name, _flip, f"{name} .* SHA-256") for name in FILES],
    *[
        (name, lambda file: file.write_bytes(file.read_bytes()[:-1]), f"{name} has .* bytes instead of")
        for name in FILES
    ],
    *[(name, lambda file: file.write_bytes(b""), f"{name} has 0 bytes instead of") for name in FILES],
    *[(name, lambda file: file.unlink(), f"{name} is missing") for name in (*FILES, "manifest.json")],
    ("manifest.json", lambda file: file.write_bytes(b""), "manifest.json is damaged"),
    ("manifest.json", lambda file: file.write_bytes(file.read_bytes()[:50]), "manifest.json is damaged"),
    ("manifest.json", lambda file: file.write_bytes(b"\xff\xfe"), "manifest.json is damaged"),
    ("manifest.json", _edit_manifest(False, step="many"), "manifest.json is damaged"),
    ("manifest.json", _edit_manifest(False, step=1), "manifest.json is damaged"),
    ("manifest.json", _edit_manifest(False, job_uid="other"), "manifest.json is damaged"),
    ("model.safetensors", _replace_by_folder, "model.safetensors (has|is missing)"),
    ("manifest.json", _replace_by_folder, "manifest.json is missing"),
]
FOREIGN = [
    (_edit_manifest(job_uid="other"), r"manifest.json belongs to another job \(other\)"),
    (
        _edit_manifest(format_version=FORMAT_VERSION + 1),
        "manifest.json has format 3, but this trainer reads .* 2",
    ),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGES)
def test_damaged_checkpoint_is_renamed_with_the_reason(
    tmp_path: Path, name: str, damage: Callable[[Path], object], message: str
) -> None:
    store = open_store(tmp_path)
    store.save(snapshot(1), 0)
    newest = store.save(snapshot(2), 0)
    damage(newest.folder / name)
    chosen, (warning,) = choose(tmp_path)
    assert chosen is not None
    assert chosen.manifest.step == 1
    assert re.search(f"^checkpoint step-00000002-a1 is damaged: {message}", warning), warning
    assert warning.endswith("renamed to corrupt-step-00000002-a1-1")
    corrupt = paths.checkpoints(tmp_path) / "corrupt-step-00000002-a1-1"
    assert (corrupt / "reason.txt").read_text().strip() in warning
    assert names(tmp_path) == [corrupt.name, "step-00000001-a1"]
    assert open_store(tmp_path, 9).num_corrupt() == 1
    # It is not read again, and never deleted.
    chosen, warnings = choose(tmp_path)
    assert chosen is not None
    assert warnings == []
    open_store(tmp_path, 9, keep=1).save(snapshot(3), 0)
    assert names(tmp_path) == [corrupt.name, "step-00000003-a9"]


@pytest.mark.parametrize(("damage", "message"), FOREIGN)
def test_foreign_checkpoint_is_skipped_and_kept(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    store = open_store(tmp_path)
    store.save(snapshot(1), 0)
    damage(store.save(snapshot(2), 0).folder / "manifest.json")
    chosen, (warning,) = choose(tmp_path)
    assert chosen is not None
    assert chosen.manifest.step == 1
    assert re.search(f"^checkpoint step-00000002-a1 is skipped: {message}", warning), warning
    assert names(tmp_path) == ["step-00000001-a1", "step-00000002-a1"]


def test_extra_files_are_ignored(tmp_path: Path) -> None:
    committed = open_store(tmp_path).save(snapshot(1), 0)
    (committed.folder / ".nfs0001").write_bytes(b"x")
    (paths.checkpoints(tmp_path) / "notes.txt").touch()
    assert choose(tmp_path)[0] is not None


def test_checkpoints_beyond_keep_are_removed(tmp_path: Path) -> None:
    store = open_store(tmp_path, keep=2)
    for step in (1, 2, 3):
        store.save(snapshot(step), 0)
    assert names(tmp_path) == ["step-00000002-a1", "step-00000003-a1"]


def test_damaged_newer_checkpoint_does_not_count_for_keep(tmp_path: Path) -> None:
    """Attempt 1 left a damaged checkpoint of step 9; attempt 2 resumes from step 1 and keeps one checkpoint."""
    store = open_store(tmp_path, keep=2)
    store.save(snapshot(1), 0)
    _flip(store.save(snapshot(9), 0).folder / "state.json")
    following = open_store(tmp_path, attempt=2, keep=1)
    following.save(snapshot(2), 0)
    assert names(tmp_path) == ["step-00000002-a2", "step-00000009-a1"]
    chosen, (warning,) = choose(tmp_path)
    assert chosen is not None
    assert chosen.manifest.step == 2
    assert "step-00000009-a1 is damaged" in warning


def test_damaged_checkpoint_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    _flip(store.save(snapshot(1), 0).folder / "state.json")
    store.save(snapshot(1), 0)
    assert choose(tmp_path)[1] == []
    assert names(tmp_path) == ["corrupt-step-00000001-a1-1", "step-00000001-a1"]


def test_two_survivors_write_the_same_step(tmp_path: Path) -> None:
    """The first rename counts; the second writer finds a valid checkpoint and keeps it."""
    store = open_store(tmp_path)
    first = store.save(snapshot(1), 0, "-r1")
    assert store.save(snapshot(1), 1, "-r2").folder == first.folder
    assert names(tmp_path) == ["step-00000001-a1"]


def test_step_can_be_claimed_once(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert store.claim(4)
    assert not store.claim(4)
    assert store.claim(5)
    assert not store.holds(4)
    store.save(snapshot(4), 0)
    assert store.holds(4)
    assert not store.holds(5)


def test_parts_of_several_writers_make_one_checkpoint(tmp_path: Path) -> None:
    store, state = open_store(tmp_path), snapshot(3)
    parts = [store.write_part(Snapshot(3, take_part(state.tensors, part, 2), {}), part, 2) for part in (1, 0)]
    committed = store.commit(state, [entry for part in parts for entry in part], 0)
    assert choose(tmp_path) == (committed, [])
    loaded = store.load(committed)
    assert {group: sorted(each) for group, each in loaded.tensors.items()} == {
        "model": ["w"],
        "optimizer": ["w.exp_avg"],
    }


def test_checkpoint_with_a_missing_part_is_not_committed(tmp_path: Path) -> None:
    store, state = open_store(tmp_path), snapshot(3)
    files = store.write_part(Snapshot(3, take_part(state.tensors, 0, 2), {}), 0, 2)
    lost = [entry.model_copy(update={"name": "optimizer-00002-of-00002.safetensors"}) for entry in files]
    with pytest.raises(StorageError, match=r"optimizer-00002-of-00002\.safetensors is missing"):
        store.commit(state, [*files, *lost], 0)
    assert choose(tmp_path) == (None, [])


def test_leftovers_are_removed(tmp_path: Path) -> None:
    open_store(tmp_path)
    for name in (".writing-step-00000001-a1", ".deleting-step-00000001-a1"):
        (paths.checkpoints(tmp_path) / name).mkdir()
    open_store(tmp_path, attempt=2)
    assert names(tmp_path) == []


def test_superseded_attempt_commits_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path, attempt=1)
    store.save(snapshot(1), 0)
    open_store(tmp_path, attempt=2)
    with pytest.raises(SupersededError, match="attempt 2 has begun: attempt 1 stops writing"):
        store.save(snapshot(2), 0)
    assert choose(tmp_path)[0] is not None
    assert [name for name in names(tmp_path) if not name.startswith(".")] == ["step-00000001-a1"]


@pytest.mark.parametrize("stage", ["write optimizer", "read back", "write manifest", "check the fence"])
def test_superseded_during_a_save(tmp_path: Path, stage: str) -> None:
    """The newer attempt removes the files that the older one still writes."""

    def supersede(now: str) -> None:
        if now == stage:
            open_store(tmp_path, attempt=2)

    with pytest.raises(SupersededError):
        open_store(tmp_path, attempt=1, on_stage=supersede).save(snapshot(1), 0)
    assert names(tmp_path) in ([], [".writing-step-00000001-a1"])


def test_superseded_before_pruning_deletes_nothing(tmp_path: Path) -> None:
    def supersede(now: str) -> None:
        if now == "prune":
            open_store(tmp_path, attempt=2)

    open_store(tmp_path, keep=1).save(snapshot(1), 0)
    with pytest.raises(SupersededError):
        open_store(tmp_path, keep=1, on_stage=supersede).save(snapshot(2), 0)
    assert names(tmp_path) == ["step-00000001-a1", "step-00000002-a1"]


def test_superseded_at_the_start(tmp_path: Path) -> None:
    Fence(tmp_path, 3).mark()
    with pytest.raises(SupersededError):
        open_store(tmp_path, attempt=2)


def test_same_attempt_can_restart(tmp_path: Path) -> None:
    open_store(tmp_path, attempt=2).save(snapshot(1), 0)
    open_store(tmp_path, attempt=2).save(snapshot(2), 0)
    assert (paths.fence(tmp_path) / "attempt-00000002").exists()


def test_error_names_the_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "job").write_text("a file", encoding="utf-8")
    with pytest.raises(StorageError, match=r"checkpoint storage: .*job"):
        open_store(tmp_path / "job")


def test_superseded_after_the_rename_deletes_nothing(tmp_path: Path) -> None:
    def supersede(now: str) -> None:
        if now == "check the fence again":
            open_store(tmp_path, attempt=2)

    open_store(tmp_path, keep=1).save(snapshot(1), 0)
    with pytest.raises(SupersededError):
        open_store(tmp_path, keep=1, on_stage=supersede).save(snapshot(2), 0)
    # Nothing was deleted, so the newer attempt still has the checkpoint that it may have chosen.
    assert names(tmp_path) == ["step-00000001-a1", "step-00000002-a1"]


def test_data_that_reads_back_differently_is_not_committed(tmp_path: Path) -> None:
    def damage(stage: str) -> None:
        if stage == "read back":
            _flip(paths.checkpoints(tmp_path) / ".writing-step-00000002-a1" / "model.safetensors")

    open_store(tmp_path, keep=1).save(snapshot(1), 0)
    with pytest.raises(StorageError, match="written data reads back differently: model"):
        open_store(tmp_path, keep=1, on_stage=damage).save(snapshot(2), 0)
    chosen, _ = choose(tmp_path)
    assert chosen is not None
    assert chosen.manifest.step == 1


def _save_twice(job_dir: Path, stage: str) -> None:
    def kill(now: str) -> None:
        if now.startswith(stage):
            os.kill(os.getpid(), signal.SIGKILL)

    open_store(job_dir).save(snapshot(1), 0)
    open_store(job_dir, keep=1, on_stage=kill).save(snapshot(2), 0)


OTHER_STAGES = {SaveStage.COPY, SaveStage.WRITE_EMA, SaveStage.DONE}
"""Stages that this save does not reach, or that come after its end."""


@pytest.mark.parametrize("stage", [stage for stage in SaveStage if stage not in OTHER_STAGES])
def test_kill_during_a_save_loses_no_committed_checkpoint(tmp_path: Path, stage: str) -> None:
    process = multiprocessing.get_context("fork").Process(target=_save_twice, args=(tmp_path, stage))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    chosen, warnings = choose(tmp_path)
    assert warnings == []
    assert chosen is not None
    assert chosen.manifest.step in (1, 2)
    assert all(name.startswith("step-") for name in names(tmp_path))
