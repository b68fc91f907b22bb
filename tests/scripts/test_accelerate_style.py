"""Scripts in the style of accelerate's examples: other loaders, other names, and batches that they skip themselves."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from finetune_contract.exit_codes import ExitCode
from testing.trainer.script_ranks import At, ScriptRanks
from testing.trainer.scripts import PROGRAMS, script_spec

pytestmark = pytest.mark.trainer


def _compare(args: dict[str, Any], world_size: int, folder: Path, script: Path | str = "train_accelerate.py") -> None:
    """Check that a run with a notice in the second epoch ends with the weights of an undisturbed one."""
    spec = script_spec(script, {"checkpointing_steps": 100, **args})
    whole = ScriptRanks(spec, folder / "whole", world_size=world_size)
    assert whole.run() == [0] * world_size, whole.stderr()
    step = 8 // world_size + 2
    run = ScriptRanks(spec, folder / "run", world_size=world_size, at=(At("backward", step, 0, signal.SIGTERM),))
    assert run.run() == [ExitCode.SAVED] * world_size, run.stderr()
    names = {path.name for path in (run.job_dir / "script").iterdir()}
    assert any(name.startswith("step_") for name in names)
    again = ScriptRanks(spec, run.folder, attempt=2, world_size=world_size)
    assert again.run() == [0] * world_size, again.stderr()
    assert again.reports()[-1]["restoredStep"] >= step
    assert again.output() == whole.output()


@pytest.mark.parametrize(
    ("args", "world_size"),
    [
        ({"skip": "accelerate"}, 1),
        ({"skip": "by_hand"}, 1),
        ({"skip": "none", "seedable": True}, 2),
        ({"data": "iterable", "skip": "none"}, 2),
        ({"data": "dispatch", "skip": "none"}, 2),
    ],
    ids=["skip_first_batches", "by hand", "seedable sampler", "iterable", "dispatched"],
)
def test_the_position_is_restored_once(args: dict[str, Any], world_size: int, tmp_path: Path) -> None:
    script: Path | str = "train_accelerate.py"
    if args["skip"] != "by_hand":
        # The text of a script decides whether it gets batches to skip: remove the branch that this one does not use.
        text = (PROGRAMS / script).read_text(encoding="utf-8")
        head, tail = text.split('            if args.skip == "by_hand"')
        script = tmp_path / "train.py"
        script.write_text(head + tail.split("continue\n", 1)[1], encoding="utf-8")
    _compare(args, world_size, tmp_path, script)


def test_all_ranks_save_and_the_checkpoint_is_committed(tmp_path: Path) -> None:
    spec = script_spec("train_accelerate.py", {"checkpointing_steps": 3}, checkpointInterval={"steps": 1000})
    run = ScriptRanks(spec, tmp_path / "run", world_size=2, at=(At("backward", 9, 0), At("backward", 9, 1)))
    assert run.run() == [-signal.SIGKILL] * 2
    again = ScriptRanks(spec, run.folder, attempt=2, world_size=2)
    assert again.run() == [0, 0], again.stderr()
    assert again.reports()[-1]["restoredStep"] == 6


@pytest.mark.parametrize("on_all_ranks", [True, False])
def test_a_checkpoint_that_is_replaced_stays_until_the_new_one_is_complete(on_all_ranks: bool, tmp_path: Path) -> None:
    text = (PROGRAMS / "train_accelerate.py").read_text(encoding="utf-8").replace('f"step_{steps}"', '"last"')
    text = text.replace('.replace("step_", "")', '.replace("last", "3")')
    if not on_all_ranks:
        text = text.replace(
            "if steps % args.checkpointing_steps == 0:", "if accelerator.is_main_process and steps % 3 == 0:"
        )
    script = tmp_path / "train.py"
    script.write_text(text, encoding="utf-8")
    spec = script_spec(script, {"checkpointing_steps": 3}, checkpointInterval={"steps": 1000})
    run = ScriptRanks(spec, tmp_path / "run", at=(At("save", 2),))
    assert run.run() == [-signal.SIGKILL], run.stderr()
    again = ScriptRanks(spec, run.folder, attempt=2)
    assert again.run() == [0], again.stderr()
    assert again.reports()[-1]["restoredStep"] == 3
