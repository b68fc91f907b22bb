"""Scripts under the hook: real ranks, with preemption notices and kills. The weights are compared bit for bit."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from finetune_contract import environment
from finetune_contract.exit_codes import ExitCode
from testing.trainer.ranks import DEADLINE_SECONDS
from testing.trainer.script_ranks import FAULTY_DEVICE, At, ScriptRanks
from testing.trainer.scripts import script_spec
from tests.scripts.conftest import Undisturbed

pytestmark = pytest.mark.trainer


def _batches(folder: Path, rank: int) -> dict[int, str]:
    """Return the samples and a random draw of each step; a repeated step replaces the first one."""
    lines = (folder / f"batches-{rank}").read_text(encoding="utf-8").splitlines()
    return {int(line.partition(" ")[0]): line for line in lines}


@pytest.mark.parametrize(("step", "world_size"), [(3, 1), (7, 2)], ids=["first epoch", "later epoch"])
def test_a_notice_loses_no_step_and_changes_no_weight(
    step: int, world_size: int, undisturbed: Undisturbed, args: dict[str, Any], tmp_path: Path
) -> None:
    run = ScriptRanks(
        script_spec("train_style.py", args),
        tmp_path / "run",
        world_size=world_size,
        # The last rank alone receives it: the ranks agree to stop.
        at=(At("backward", step, world_size - 1, signal.SIGTERM),),
    )
    assert run.run() == [ExitCode.SAVED] * world_size, run.stderr()
    saved = int(run.checkpoints[-1].partition("-")[2])
    # The handler of the signal runs in a thread of its own: it may take part in the next agreement only.
    assert saved >= step
    again = ScriptRanks(run.spec, run.folder, attempt=2, world_size=world_size)
    assert again.run() == [0] * world_size, again.stderr()
    assert again.reports()[-1]["restored_step" if "restored_step" in again.reports()[-1] else "restoredStep"] == saved
    assert again.output() == undisturbed(world_size).output()
    for rank in range(world_size):
        reference = _batches(undisturbed(world_size).folder.parent, rank)
        assert _batches(tmp_path, rank) == reference


def test_the_survivor_of_a_lost_peer_saves_the_last_step(
    undisturbed: Undisturbed, args: dict[str, Any], tmp_path: Path
) -> None:
    run = ScriptRanks(script_spec("train_style.py", args), tmp_path / "run", world_size=2, at=(At("backward", 8, 1),))
    assert run.run() == [ExitCode.FABRIC, -signal.SIGKILL], run.stderr()
    assert run.checkpoints[-1] == "checkpoint-7"
    again = ScriptRanks(run.spec, run.folder, attempt=2, world_size=2)
    assert again.run() == [0, 0], again.stderr()
    assert again.output() == undisturbed(2).output()


def test_the_survivor_completes_the_save_in_which_a_peer_is_lost(
    undisturbed: Undisturbed, args: dict[str, Any], tmp_path: Path
) -> None:
    spec = script_spec("train_style.py", {**args, "checkpointing_steps": 100}, checkpointInterval={"steps": 4})
    run = ScriptRanks(spec, tmp_path / "run", world_size=2, at=(At("saved", 1, 0),))
    assert run.run() == [-signal.SIGKILL, ExitCode.FABRIC], run.stderr(1)
    assert run.checkpoints == ["checkpoint-4"]
    again = ScriptRanks(spec, run.folder, attempt=2, world_size=2)
    assert again.run() == [0, 0], again.stderr()
    assert again.output() == undisturbed(2).output()
    assert "resuming" in again.stderr()


def test_the_survivor_on_another_node_saves_also_if_rank_0_is_lost(
    undisturbed: Undisturbed, args: dict[str, Any], tmp_path: Path
) -> None:
    spec = script_spec("train_style.py", args)
    apart = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    run = ScriptRanks(spec, tmp_path / "run", world_size=2, extra=apart, waits=True, at=(At("backward", 8, 0),))
    assert run.run() == [-signal.SIGKILL, ExitCode.FABRIC], run.stderr(1)
    assert run.checkpoints[-1] == "checkpoint-7"
    again = ScriptRanks(run.spec, run.folder, attempt=2, world_size=2)
    assert again.run() == [0, 0], again.stderr()
    assert again.output() == undisturbed(2).output()


def test_a_loss_between_update_and_agreement_falls_back_to_the_last_checkpoint(
    undisturbed: Undisturbed, args: dict[str, Any], tmp_path: Path
) -> None:
    """No survivor has the random state of the lost rank at that step, so the step is repeated."""
    run = ScriptRanks(script_spec("train_style.py", args), tmp_path / "run", world_size=2, at=(At("step", 8, 1),))
    assert run.run() == [ExitCode.FABRIC, -signal.SIGKILL], run.stderr()
    assert run.checkpoints[-1] == "checkpoint-5"
    again = ScriptRanks(run.spec, run.folder, attempt=2, world_size=2)
    assert again.run() == [0, 0], again.stderr()
    assert again.output() == undisturbed(2).output()


def test_nodes_that_do_not_wait_for_each_other_lose_no_step_on_a_notice(
    undisturbed: Undisturbed, args: dict[str, Any], tmp_path: Path
) -> None:
    apart = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    notice = (At("backward", 5, 1, signal.SIGTERM),)
    # The script saves each step and keeps one: its newest checkpoint is not committed when it deletes it.
    spec = script_spec("train_style.py", {**args, "checkpointing_steps": 1, "checkpoints_total_limit": 1})
    run = ScriptRanks(spec, tmp_path / "run", world_size=2, extra=apart, at=notice)
    assert run.run() == [ExitCode.SAVED] * 2, run.stderr()
    again = ScriptRanks(spec, run.folder, attempt=2, world_size=2, extra=apart)
    assert again.run() == [0, 0], again.stderr()
    assert again.output() == undisturbed(2).output()
    assert again.checkpoints == ["checkpoint-12"]


def test_saves_follow_the_interval_of_the_job(args: dict[str, Any], tmp_path: Path) -> None:
    spec = script_spec(
        "train_style.py",
        {**args, "checkpointing_steps": 500, "checkpoints_total_limit": None},
        checkpointInterval={"steps": 4},
        keep=2,
    )
    run = ScriptRanks(spec, tmp_path / "run")
    assert run.run() == [0], run.stderr()
    assert run.checkpoints == ["checkpoint-8", "checkpoint-12"]


def test_the_status_shows_steps_total_loss_rate_and_checkpoint(undisturbed: Undisturbed) -> None:
    report = undisturbed(1).reports()[-1]
    assert (report["step"], report["totalSteps"], report["restoredStep"]) == (12, 12, 0)
    assert 0 < report["loss"] < 10
    assert report["imagesPerSecond"] > 0
    assert report["checkpoint"]["step"] == 12
    states = [each["state"] for each in undisturbed(1).reports()]
    assert [state for state in ("Loading", "Training", "Saving", "Exporting", "Done") if state in states] == [
        "Loading",
        "Training",
        "Saving",
        "Exporting",
        "Done",
    ]


def test_the_total_of_epochs_comes_from_the_progress_bar(args: dict[str, Any], tmp_path: Path) -> None:
    spec = script_spec("train_style.py", {**args, "max_train_steps": None, "num_train_epochs": 1, "num_samples": 6})
    run = ScriptRanks(spec, tmp_path / "run")
    assert run.run() == [0], run.stderr()
    assert run.reports()[-1]["totalSteps"] == 3


def test_accumulation_workers_and_the_end_of_an_epoch(args: dict[str, Any], tmp_path: Path) -> None:
    """10 batches in an epoch, 3 in a step: the last step of an epoch has one batch."""
    args |= {"gradient_accumulation_steps": 3, "dataloader_num_workers": 2, "checkpointing_steps": 500}
    spec = script_spec("train_style.py", args)
    whole = ScriptRanks(spec, tmp_path / "whole")
    assert whole.run() == [0], whole.stderr()
    run = ScriptRanks(spec, tmp_path / "run", at=(At("step", 4, 0, signal.SIGTERM),))
    assert run.run() == [ExitCode.SAVED], run.stderr()
    second = ScriptRanks(spec, run.folder, attempt=2, at=(At("backward", 2, 0, signal.SIGTERM),))
    assert second.run() == [ExitCode.SAVED], second.stderr()
    last = ScriptRanks(spec, run.folder, attempt=3)
    assert last.run() == [0], last.stderr()
    assert last.output() == whole.output()


def test_the_end_is_repeated_without_another_step(
    undisturbed: Undisturbed, args: dict[str, Any], tmp_path: Path
) -> None:
    """A script that resumes its last step trains one more without the hook."""
    run = ScriptRanks(script_spec("train_style.py", args), tmp_path / "run")
    assert run.run() == [0], run.stderr()
    (run.job_dir / "script" / "model.pt").unlink()
    again = ScriptRanks(run.spec, run.folder, attempt=2)
    assert again.run() == [0], again.stderr()
    assert again.output() == undisturbed(1).output()


def test_another_number_of_ranks_is_reported(args: dict[str, Any], tmp_path: Path) -> None:
    spec = script_spec("train_style.py", args)
    run = ScriptRanks(spec, tmp_path / "run", world_size=2, at=(At("backward", 3, 0, signal.SIGTERM),))
    assert run.run() == [ExitCode.SAVED] * 2, run.stderr()
    again = ScriptRanks(spec, run.folder, attempt=2)
    assert again.run() == [0], again.stderr()
    assert "of 2 ranks and this attempt has 1" in again.stderr()


def test_a_superseded_attempt_does_not_commit(args: dict[str, Any], tmp_path: Path) -> None:
    spec = script_spec("train_style.py", args)
    folder = tmp_path / "run" / "job" / "fence"
    folder.mkdir(parents=True)
    (folder / "attempt-00000002").touch()
    run = ScriptRanks(spec, tmp_path / "run")
    assert run.run() == [ExitCode.SUPERSEDED], run.stderr()


def test_a_script_without_accelerate_is_run_and_counted(tmp_path: Path) -> None:
    script = tmp_path / "plain.py"
    script.write_text(
        "import torch\n"
        "model = torch.nn.Linear(2, 1)\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "for _ in range(5):\n"
        "    model(torch.ones(1, 2)).sum().backward()\n"
        "    optimizer.step()\n",
        encoding="utf-8",
    )
    run = ScriptRanks(script_spec(script, {}), tmp_path / "run")
    assert run.run() == [0], run.stderr()
    assert run.reports()[-1]["step"] == 5
    assert any("does not use accelerate" in each for each in run.reports()[-1]["warnings"])


def test_wrong_arguments_are_an_error_of_the_manifest(tmp_path: Path) -> None:
    run = ScriptRanks(script_spec("train_style.py", {"no_such_flag": 1}), tmp_path / "run")
    assert run.run() == [ExitCode.CONFIG]
    assert "unrecognized arguments: --no_such_flag 1" in run.stderr()
    assert "training.script.args" in run.stderr()


@pytest.mark.parametrize("end", ["raise RuntimeError('PytorchStreamWriter failed writing file')", "sys.exit(1)"])
def test_an_output_folder_that_cannot_be_written_explains_an_error(end: str, tmp_path: Path) -> None:
    script = tmp_path / "plain.py"
    lines = [
        "import os, shutil, sys",
        "folder = sys.argv[2]",
        "shutil.rmtree(folder)",
        "os.symlink(folder, folder)",
        end,
    ]
    script.write_text("\n".join([*lines, "parser.add_argument('--output_dir')"]), encoding="utf-8")
    run = ScriptRanks(script_spec(script, {}), tmp_path / "run")
    assert run.run() == [ExitCode.STORAGE], run.stderr()
    assert f"plain.py failed, and {run.job_dir / 'script'} cannot be written: Too many levels" in run.stderr()
    assert ("PytorchStreamWriter" in run.stderr()) == end.startswith("raise")


def test_a_faulty_device_is_found_before_the_script_starts(args: dict[str, Any], tmp_path: Path) -> None:
    run = ScriptRanks(
        script_spec("train_style.py", args),
        tmp_path / "run",
        world_size=2,
        extra={environment.CHECK_DEVICES: "1"},
        per_rank={1: {FAULTY_DEVICE: "1"}},
    )
    message = "the device of rank 1 does not respond or computes wrong results"
    run.start()
    run.wait_until(lambda report: any(message in each for each in report.get("warnings", ())))
    # The supervisor ends the rank whose peer is gone.
    run.processes[1].join(DEADLINE_SECONDS)
    run.send(signal.SIGKILL, 0)
    assert run.wait() == [-signal.SIGKILL, ExitCode.DEVICE], run.stderr(1)
    assert message in run.stderr(1)
    assert not any(report.get("step") for rank in range(2) for report in run.reports(rank))
