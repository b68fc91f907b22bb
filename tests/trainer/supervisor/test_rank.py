"""Complete runs of real ranks, and their exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from finetune_contract import environment, paths
from finetune_contract.exit_codes import ExitCode
from finetune_trainer.phases import StartPhase
from testing.trainer import tiny
from testing.trainer.ranks import Ranks

pytestmark = pytest.mark.trainer


def lora(ranks: Ranks) -> dict[str, torch.Tensor]:
    tensors = dict(load_file(ranks.job_dir / "outputs" / "pytorch_lora_weights.safetensors"))
    assert tensors
    return tensors


def test_rank_started_by_its_command(base: Path, data: Path, tmp_path: Path) -> None:
    """Run the entry point in a new process, including its imports."""
    (tmp_path / "run.json").write_text(tiny.make_spec(base, data).to_json(), encoding="utf-8")
    env = {
        **os.environ,
        environment.RUN_SPEC: str(tmp_path / "run.json"),
        environment.ATTEMPT: "1",
        environment.CHECKPOINT_DIR: str(tmp_path / "job"),
        environment.CACHE_DIR: str(tmp_path / "cache"),
        environment.BACKEND: "gloo",
    }
    command = [sys.executable, "-m", "finetune_trainer.rank"]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == ExitCode.DONE, ended.stderr
    assert ended.stdout == ""
    assert ended.stderr.splitlines()[-1] == "done"
    assert (tmp_path / "job" / "outputs" / "pytorch_lora_weights.safetensors").is_file()


def test_validation_writes_images_and_losses(base: Path, data: Path, tmp_path: Path) -> None:
    validation = {"prompts": ["picture 1", "picture 2", "x"], "split": "test", "steps": 4, "numInferenceSteps": 2}
    ranks = Ranks(tiny.make_spec(base, data, validation=validation), tmp_path / "job", world_size=2)
    assert ranks.run() == [ExitCode.DONE] * 2, ranks.stderr()
    folder = ranks.job_dir / "validation"
    losses = json.loads((folder / "losses.json").read_text())
    assert [entry["step"] for entry in losses] == [0, 4, 6]
    assert losses[-1]["loss"] < losses[0]["loss"]
    assert Image.open(folder / "before-after.png").width > 3 * 192
    assert len(list((folder / "pictures").iterdir())) == 9
    # Validation does not change training: the run without it ends with the same weights.
    plain = Ranks(tiny.make_spec(base, data), tmp_path / "plain", world_size=2)
    assert plain.run() == [ExitCode.DONE] * 2
    assert plain.weights() == ranks.weights()


def test_final_report(base: Path, data: Path, tmp_path: Path) -> None:
    ranks = Ranks(tiny.make_spec(base, data), tmp_path / "job")
    assert ranks.run() == [ExitCode.DONE]
    last = ranks.reports()[-1]
    assert (last["state"], last["step"], last["totalSteps"], last["restoredStep"]) == ("Done", 6, 6, 0)
    assert last["checkpoint"]["step"] == 6
    assert last["loss"] > 0
    assert last["imagesPerSecond"] > 0
    newest = ranks.job_dir / "checkpoints" / "step-00000006-a1"
    assert {entry.name for entry in newest.iterdir()} == {
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    }
    for name in ("model", "optimizer"):
        keys = list(load_file(newest / f"{name}.safetensors"))
        assert keys
        assert all("lora_" in key for key in keys)
    assert last["checkpoint"]["stallSeconds"] >= 0
    assert last["checkpoint"]["durableSeconds"] > 0
    (output,) = last["outputs"]
    written = [path for path in (ranks.job_dir / paths.OUTPUTS).rglob("*") if path.is_file()]
    assert output["sizeBytes"] == sum(path.stat().st_size for path in written)
    phases = last["startSeconds"]
    assert list(phases) == [each.value for each in StartPhase]
    assert sum(phases.values()) > 0
    assert "first step after " in ranks.stderr()


def test_losses_do_not_depend_on_the_world_size(base: Path, data: Path, tmp_path: Path) -> None:
    """1 rank, 3 ranks (shares of 2, 1 and 1), 5 ranks (one without samples): the weights agree up to rounding."""
    spec = tiny.make_spec(base, data, randomFlip=True)
    runs = [Ranks(spec, tmp_path / f"job{size}", world_size=size) for size in (1, 3, 5)]
    for ranks in runs:
        assert ranks.run() == [ExitCode.DONE] * ranks.world_size, ranks.stderr()
    reference = lora(runs[0])
    for ranks in runs[1:]:
        for name, value in lora(ranks).items():
            torch.testing.assert_close(value, reference[name], rtol=1e-3, atol=1e-4)


def test_resized_run_continues_with_the_same_batches(base: Path, data: Path, tmp_path: Path) -> None:
    """Run with two ranks, then one, then two again."""
    spec = tiny.make_spec(base, data, steps=12)
    reference = Ranks(spec, tmp_path / "reference", world_size=2)
    assert reference.run() == [ExitCode.DONE] * 2
    for attempt, (world_size, step) in enumerate(((2, 3), (1, 7)), start=1):
        ranks = Ranks(spec, tmp_path / "job", attempt, world_size).start()
        ranks.wait_until(lambda report, step=step: report.get("step", -1) >= step)  # type: ignore[misc]
        ranks.send(signal.SIGTERM, 0)
        assert ranks.wait() == [ExitCode.SAVED] * world_size, ranks.stderr()
    last = Ranks(spec, tmp_path / "job", 3, 2)
    assert last.run() == [ExitCode.DONE] * 2, last.stderr()
    for name, value in lora(last).items():
        torch.testing.assert_close(value, lora(reference)[name], rtol=1e-3, atol=1e-4)


def test_only_random_crops_are_encoded_in_every_step(base: Path, tmp_path: Path) -> None:
    """Images that are not square are encoded in every step if cropped at random, otherwise once for all jobs."""
    data = tiny.write_data(tmp_path / "data", size=(24, 16))
    live = Ranks(tiny.make_spec(base, data), tmp_path / "live")
    assert live.run() == [ExitCode.DONE], live.stderr()
    assert "training.centerCrop: images are not square" in "\n".join(live.reports()[-1]["warnings"])
    cached = Ranks(tiny.make_spec(base, data, centerCrop=True), tmp_path / "cached")
    assert cached.run() == [ExitCode.DONE], cached.stderr()
    assert "centerCrop" not in "\n".join(cached.reports()[-1].get("warnings", []))
    assert live.weights() != cached.weights()
    cache = tmp_path / "cache"
    filled = sorted(cache.rglob("*.safetensors"))
    # A second job finds all latents in the cache.
    again = Ranks(tiny.make_spec(base, data, centerCrop=True), tmp_path / "again")
    assert again.run() == [ExitCode.DONE]
    assert again.weights() == cached.weights()
    assert sorted(cache.rglob("*.safetensors")) == filled


def test_v_prediction_bf16_min_snr_and_epochs(base: Path, data: Path, tmp_path: Path) -> None:
    del base
    spec = tiny.make_spec(
        tiny.write_base(tmp_path / "base", "v_prediction"),
        data,
        steps=None,
        epochs=2,
        precision="bf16",
        snrGamma=5.0,
        gradientCheckpointing=True,
    )
    ranks = Ranks(spec, tmp_path / "job")
    assert ranks.run() == [ExitCode.DONE], ranks.stderr()
    assert ranks.reports()[-1]["totalSteps"] == 4
    assert all(value.dtype is torch.float32 for value in lora(ranks).values())


def test_preemption_notice_before_training_exits_at_once(base: Path, data: Path, tmp_path: Path) -> None:
    """Rank 0 waits in the rendezvous for a rank that never joins."""
    ranks = Ranks(tiny.make_spec(base, data), tmp_path / "job", extra={"WORLD_SIZE": "2"}).start()
    ranks.wait_until(lambda report: report["state"] == "Starting")
    ranks.send(signal.SIGTERM, 0)
    assert ranks.wait() == [ExitCode.SAVED]
    assert ranks.reports()[-1]["state"] == "Saved"
    assert not (ranks.job_dir / "checkpoints").exists()


def test_damaged_newest_checkpoint_is_skipped(base: Path, data: Path, tmp_path: Path) -> None:
    spec = tiny.make_spec(base, data)
    ranks = Ranks(spec, tmp_path / "job", world_size=2, kill_at=("prune", 2), saves_all=True)
    assert ranks.run() == [-signal.SIGKILL, ExitCode.FABRIC]
    *_, older, newest = sorted((ranks.job_dir / "checkpoints").iterdir())
    assert newest.name == "step-00000006-a1"
    # The emergency save of rank 1 holds step 5 if rank 0 was killed before rank 1 got the result of the sixth sum.
    assert older.name in ("step-00000004-a1", "step-00000005-a1")
    file = newest / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x00")
    following = Ranks(spec, tmp_path / "job", 2, 2)
    assert following.run() == [ExitCode.DONE] * 2
    last = following.reports()[-1]
    assert last["restoredStep"] == int(older.name.split("-")[1])
    assert "step-00000006-a1 is damaged: optimizer.safetensors" in "\n".join(last["warnings"])
    assert last["corruptCheckpoints"] == 1
    assert (ranks.job_dir / "checkpoints" / "corrupt-step-00000006-a1-1" / "reason.txt").is_file()
    reference = Ranks(spec, tmp_path / "reference", world_size=2)
    assert reference.run() == [ExitCode.DONE] * 2
    assert following.weights() == reference.weights()


def test_superseded_attempt(base: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "job" / "job" / "fence").mkdir(parents=True)
    (tmp_path / "job" / "job" / "fence" / "attempt-00000003").touch()
    ranks = Ranks(tiny.make_spec(base, data), tmp_path / "job", attempt=2)
    assert ranks.run() == [ExitCode.SUPERSEDED]
    assert "attempt 3 has begun" in ranks.stderr()


def test_unwritable_storage(base: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "job").write_text("a file instead of a folder", encoding="utf-8")
    ranks = Ranks(tiny.make_spec(base, data), tmp_path / "job")
    assert ranks.run() == [ExitCode.STORAGE]
    assert "checkpoint storage" in ranks.stderr()


def test_diverging_loss_ends_with_a_message(base: Path, data: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(base, tmp_path / "base")
    weights = load_file(broken / "unet" / "diffusion_pytorch_model.safetensors")
    save_file(
        {**weights, "conv_in.bias": torch.full((8,), 1e38)}, broken / "unet" / "diffusion_pytorch_model.safetensors"
    )
    ranks = Ranks(tiny.make_spec(broken, data), tmp_path / "job")
    assert ranks.run() == [ExitCode.CONFIG]
    assert "training.learningRate: loss" in ranks.stderr()


INVALID: list[tuple[str, dict[str, Any], ExitCode, str]] = [
    ("model", {"base": "/nowhere"}, ExitCode.CONFIG, "model.base: the folder /nowhere does not exist"),
    (
        "model",
        {"base": "ftp://host/model"},
        ExitCode.CONFIG,
        "model.base: ftp://host/model is not a supported location",
    ),
    ("model", {"variant": "fp16"}, ExitCode.CONFIG, "model.base: "),
    ("model", {"vae": "/nowhere"}, ExitCode.CONFIG, "model.vae: the folder /nowhere does not exist"),
    ("dataset", {"source": "/nowhere"}, ExitCode.DATA, "dataset.source: there is no folder"),
    ("dataset", {"split": "x"}, ExitCode.DATA, "dataset.split: "),
    ("training", {"method": None}, ExitCode.CONFIG, "training.method: none is not supported; write one of Full, LoRA"),
    ("training", {"steps": None}, ExitCode.CONFIG, "training.steps: "),
]


@pytest.fixture(name="invalid_run", params=INVALID, ids=lambda row: f"{row[0]}.{next(iter(row[1]))}")
def _invalid_run(request: pytest.FixtureRequest, base: Path, data: Path, tmp_path: Path) -> tuple[Ranks, ExitCode, str]:
    part, changes, code, message = request.param
    spec = tiny.make_spec(base, data)
    spec = spec.model_copy(update={part: getattr(spec, part).model_copy(update=changes)})
    return Ranks(spec, tmp_path / "job"), code, message


def test_invalid_runs_end_with_a_message(invalid_run: tuple[Ranks, ExitCode, str]) -> None:
    ranks, code, message = invalid_run
    assert ranks.run() == [code]
    assert ranks.stderr().splitlines()[-1].startswith(message), ranks.stderr()
    assert ranks.reports()[-1]["state"] == "Failed"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "FINETUNE_RUN_SPEC: .* cannot be read: No such file"),
        ("{", "FINETUNE_RUN_SPEC: Invalid JSON"),
        ('{"globalBatch": 0}', "namespace: Field required"),
    ],
)
def test_invalid_run_spec(base: Path, data: Path, tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "other.json"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    ranks = Ranks(tiny.make_spec(base, data), tmp_path / "job", extra={environment.RUN_SPEC: str(file)})
    assert ranks.run() == [ExitCode.CONFIG]
    assert re.match(message, ranks.stderr().splitlines()[-1]), ranks.stderr()
