"""Known defects of scripts that are preempted, shown without the hook, and their absence with it."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from finetune_contract.exit_codes import ExitCode
from testing.trainer.script_ranks import At, ScriptRanks
from testing.trainer.scripts import PROGRAMS, script_spec
from tests.scripts.conftest import ARGS, Undisturbed

pytestmark = pytest.mark.trainer
SCRIPT = PROGRAMS / "train_style.py"


def _plain(folder: Path, *argv: str, **run: Any) -> ScriptRanks:
    """Return a run of the script without the hook."""
    output = folder / "job" / "script"
    flags = [
        text for name, value in ARGS.items() for text in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]
    argv = (*flags, "--output_dir", str(output), "--log_batches", str(folder / "batches"), *argv)
    spec = script_spec("train_style.py", {})
    return ScriptRanks(spec, folder, hooked=False, script=SCRIPT, argv=argv, **run)


def _lines(folder: Path, rank: int = 0) -> list[str]:
    return (folder / f"batches-{rank}").read_text(encoding="utf-8").splitlines()


def test_a_partial_checkpoint_is_chosen_without_the_hook(tmp_path: Path) -> None:
    run = _plain(tmp_path, "--checkpointing_steps", "3", at=(At("save", 2),))
    assert run.run() == [-signal.SIGKILL]
    assert run.checkpoints == ["checkpoint-3", "checkpoint-6"]
    again = _plain(tmp_path, "--checkpointing_steps", "3", "--resume_from_checkpoint", "latest", attempt=2)
    assert again.run() == [1]
    assert "Resuming from checkpoint checkpoint-6" in again.stderr()
    assert "FileNotFoundError" in again.stderr()


def test_a_partial_checkpoint_is_not_chosen_with_the_hook(
    undisturbed: Undisturbed, args: dict[str, Any], tmp_path: Path
) -> None:
    spec = script_spec("train_style.py", {**args, "checkpointing_steps": 3})
    run = ScriptRanks(spec, tmp_path / "run", at=(At("save", 2),))
    assert run.run() == [-signal.SIGKILL]
    assert run.checkpoints == ["checkpoint-3"]
    # One of another program, in a folder with the next name.
    (run.job_dir / "script" / "checkpoint-9").mkdir()
    again = ScriptRanks(spec, run.folder, attempt=2)
    assert again.run() == [0], again.stderr()
    assert again.reports()[-1]["restoredStep"] == 3
    assert again.reports()[-1]["corruptCheckpoints"] == 1
    assert again.output() == undisturbed(1).output()


def test_a_damaged_checkpoint_is_not_chosen_with_the_hook(
    undisturbed: Undisturbed, args: dict[str, Any], tmp_path: Path
) -> None:
    run = ScriptRanks(script_spec("train_style.py", args), tmp_path / "run", at=(At("step", 11),))
    assert run.run() == [-signal.SIGKILL]
    assert run.checkpoints == ["checkpoint-5", "checkpoint-10"]
    weights = run.job_dir / "script" / "checkpoint-10" / "model.pt"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(bytes(data))
    again = ScriptRanks(run.spec, run.folder, attempt=2)
    assert again.run() == [0], again.stderr()
    assert again.reports()[-1]["restoredStep"] == 5
    assert again.output() == undisturbed(1).output()


def test_data_is_repeated_after_a_resume_without_the_hook(tmp_path: Path) -> None:
    run = _plain(tmp_path, at=(At("step", 8),))
    assert run.run() == [-signal.SIGKILL]
    first = _lines(tmp_path)
    (tmp_path / "batches-0").unlink()
    again = _plain(tmp_path, "--resume_from_checkpoint", "latest", attempt=2)
    assert again.run() == [0], again.stderr()
    # Step 5 is in the middle of the first epoch of 10 steps. The script starts the epoch again.
    assert _lines(tmp_path)[0].split(" ", 1)[0] == first[5].split(" ", 1)[0]
    seen = {line.split("[", 1)[1].split("]")[0] for line in first[:5]}
    following = {line.split("[", 1)[1].split("]")[0] for line in _lines(tmp_path)[:5]}
    assert set(", ".join(seen).split(", ")) & set(", ".join(following).split(", "))


def test_the_random_state_of_rank_1_is_lost_without_the_hook(undisturbed: Undisturbed, tmp_path: Path) -> None:
    run = _plain(tmp_path, world_size=2, at=(At("backward", 7, 0), At("backward", 7, 1)))
    assert run.run() == [-signal.SIGKILL] * 2
    names = {path.name for path in (run.job_dir / "script" / "checkpoint-5").iterdir()}
    assert "random_states_0.pkl" in names
    assert "random_states_1.pkl" not in names
    hooked = {path.name for path in (undisturbed(2).job_dir / "script" / "checkpoint-10").iterdir()}
    assert {"random_states_0.pkl", "random_states_1.pkl"} <= hooked


def test_the_old_checkpoint_is_deleted_first_without_the_hook(tmp_path: Path) -> None:
    run = _plain(tmp_path, "--checkpoints_total_limit", "1", at=(At("save", 2),))
    assert run.run() == [-signal.SIGKILL]
    assert run.checkpoints == ["checkpoint-10"], "the only complete checkpoint is deleted"


def test_the_old_checkpoint_is_deleted_last_with_the_hook(
    undisturbed: Undisturbed, args: dict[str, Any], tmp_path: Path
) -> None:
    args["checkpoints_total_limit"] = 1
    run = ScriptRanks(script_spec("train_style.py", args), tmp_path / "run", at=(At("save", 2),))
    assert run.run() == [-signal.SIGKILL]
    assert run.checkpoints == ["checkpoint-5"]
    again = ScriptRanks(run.spec, run.folder, attempt=2)
    assert again.run() == [0], again.stderr()
    # The hook saves the last step in addition.
    assert again.checkpoints == ["checkpoint-10", "checkpoint-12"]
    assert again.output() == undisturbed(1).output()


def test_the_script_alone_resumes_a_checkpoint_of_the_hook(args: dict[str, Any], tmp_path: Path) -> None:
    run = ScriptRanks(
        script_spec("train_style.py", args), tmp_path / "run", at=(At("backward", 10, 0, signal.SIGTERM),)
    )
    assert run.run() == [ExitCode.SAVED], run.stderr()
    alone = _plain(run.folder, "--resume_from_checkpoint", "latest", attempt=2)
    assert alone.run() == [0], alone.stderr()
    assert f"Resuming from checkpoint {run.checkpoints[-1]}" in alone.stderr()
