"""The folder of a script's checkpoints: commits, choices, deletions, and what a kill leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_contract import paths
from finetune_trainer.checkpoint.store.fence import Fence
from finetune_trainer.errors import SupersededError
from finetune_trainer.script.checkpoints import DELETING, ScriptCheckpoints, is_committed, record_of


def _open(folder: Path, attempt: int = 1, uid: str = "uid", keep: int = 3) -> ScriptCheckpoints:
    checkpoints = ScriptCheckpoints(folder / "out", uid, attempt, Fence(folder, attempt), keep)
    checkpoints.open()
    return checkpoints


def _save(checkpoints: ScriptCheckpoints, step: int, by: str = "interval", name: str = "") -> Path:
    final = checkpoints.folder / (name or f"checkpoint-{step}")
    written = checkpoints.aside(final)
    (written / "unet").mkdir(parents=True)
    (written / "unet" / "model.bin").write_bytes(bytes([step]) * 100)
    found = checkpoints.commit(written, final, step, 1.0, {"by": by})
    checkpoints.prune(found.folder, [])
    return final


def test_the_newest_verified_checkpoint_is_chosen(tmp_path: Path) -> None:
    checkpoints = _open(tmp_path)
    _save(checkpoints, 9)
    _save(checkpoints, 10)
    found = _open(tmp_path, 2).find_newest()
    assert found is not None
    assert found.folder.name == "checkpoint-10"
    assert [each.name for each in found.manifest.files] == ["finetune.json", "unet/model.bin"]
    assert record_of(found.folder) == {"by": "interval"}


def test_a_damaged_one_is_renamed_and_the_one_before_is_chosen(tmp_path: Path) -> None:
    checkpoints = _open(tmp_path)
    _save(checkpoints, 9)
    (_save(checkpoints, 10) / "unet" / "model.bin").write_bytes(b"x" * 100)
    again = _open(tmp_path, 2)
    found = again.find_newest()
    assert found is not None
    assert found.folder.name == "checkpoint-9"
    assert again.num_corrupt == 1
    reason = again.folder / "corrupt-checkpoint-10-1" / paths.CORRUPT_REASON
    assert reason.read_text(encoding="utf-8") == "unet/model.bin does not match its SHA-256\n"


def test_incomplete_folders_are_renamed_except_for_the_one_that_the_user_names(tmp_path: Path) -> None:
    checkpoints = _open(tmp_path)
    for name in ("checkpoint-4", "checkpoint-5", "logs"):
        (checkpoints.folder / name).mkdir()
    checkpoints.set_aside_incomplete("checkpoint-4")
    names = sorted(each.name for each in checkpoints.folder.iterdir())
    assert names == ["checkpoint-4", "corrupt-checkpoint-5-1", "logs"]


def test_checkpoints_of_another_job_do_not_count(tmp_path: Path) -> None:
    _save(_open(tmp_path, uid="other"), 10)
    checkpoints = _open(tmp_path, 2)
    assert checkpoints.find_newest() is None
    assert is_committed(checkpoints.folder / "checkpoint-10")


def test_the_hook_keeps_its_newest_and_leaves_those_of_the_script(tmp_path: Path) -> None:
    checkpoints = _open(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        _save(checkpoints, step, by="script" if step == 1 else "interval")
    names = sorted(each.name for each in checkpoints.folder.iterdir())
    assert names == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]


def test_a_superseded_attempt_neither_commits_nor_deletes(tmp_path: Path) -> None:
    checkpoints = _open(tmp_path)
    old = _save(checkpoints, 1)
    _open(tmp_path, 2)
    with pytest.raises(SupersededError):
        _save(checkpoints, 2)
    with pytest.raises(SupersededError):
        checkpoints.prune(old.with_name("checkpoint-9"), [old])
    assert is_committed(old)


def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    checkpoints = _open(tmp_path)
    final = _save(checkpoints, 7, name="last")
    final.rename(checkpoints.aside(final))
    found = _open(tmp_path, 2).find_newest()
    assert found is not None
    assert (found.folder, found.manifest.step) == (final, 7)


def test_a_kill_in_a_deletion_leaves_nothing(tmp_path: Path) -> None:
    checkpoints = _open(tmp_path)
    final = _save(checkpoints, 7)
    (final / "unet" / "model.bin").unlink()
    final.rename(final.with_name(f"{DELETING}{final.name}"))
    again = _open(tmp_path, 2)
    assert list(again.folder.iterdir()) == []


def test_one_rank_claims_a_step(tmp_path: Path) -> None:
    checkpoints = _open(tmp_path)
    final = checkpoints.folder / "checkpoint-7"
    assert [checkpoints.claim(final), checkpoints.claim(final)] == [True, False]
