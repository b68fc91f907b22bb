"""Runs of real ranks that are interrupted and resumed end with the weights of the uninterrupted run."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune_contract.exit_codes import ExitCode
from finetune_contract.run_spec import RunSpec
from finetune_trainer.checkpoint.store.stages import SaveStage
from testing.trainer import tiny
from testing.trainer.ranks import Ranks

pytestmark = pytest.mark.trainer

STEPS = 12
SETTINGS = {"steps": STEPS, "ema": True, "randomFlip": True, "lora": {"rank": 2, "dropout": 0.1}}


@pytest.fixture(scope="module")
def spec(base: Path, data: Path) -> RunSpec:
    return tiny.make_spec(base, data, **SETTINGS).model_copy(update={"keep": 1})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of all jobs of this module, which share one cache."""
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def uninterrupted(spec: RunSpec, folder: Path) -> Callable[[int], bytes]:
    """Return a function that gives the weights of the uninterrupted run on a number of ranks."""
    weights: dict[int, bytes] = {}

    def run(world_size: int) -> bytes:
        if world_size not in weights:
            ranks = Ranks(spec, folder / f"uninterrupted-{world_size}", world_size=world_size)
            assert ranks.run() == [ExitCode.DONE] * world_size, ranks.stderr()
            weights[world_size] = ranks.weights()
        return weights[world_size]

    return run


def finish(ranks: Ranks) -> Ranks:
    """Run the next attempt until it is done."""
    following = Ranks(ranks.spec, ranks.folder, ranks.attempt + 1, ranks.world_size)
    assert following.run() == [ExitCode.DONE] * ranks.world_size, following.stderr()
    return following


def restored_step(ranks: Ranks) -> int:
    """Return the step that an attempt resumed from."""
    return int(next(report["restoredStep"] for report in ranks.reports() if "restoredStep" in report))


@pytest.fixture(name="choice", params=range(2))
def _choice(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(request.param)


@pytest.mark.parametrize("world_size", [1, 2])
def test_resume_after_a_preemption_notice_keeps_weights(
    spec: RunSpec, uninterrupted: Callable[[int], bytes], world_size: int, choice: random.Random, tmp_path: Path
) -> None:
    step, rank = choice.randrange(STEPS - 3), choice.randrange(world_size)
    ranks = Ranks(spec, tmp_path / "job", world_size=world_size)
    ranks.start()
    ranks.wait_until(lambda report: report["state"] == "Training" and report.get("step", -1) >= step)
    ranks.send(signal.SIGTERM, rank)
    assert ranks.wait() == [ExitCode.SAVED] * world_size, ranks.stderr()
    last = ranks.reports()[-1]
    assert last["state"] == "Saved"
    assert last["checkpoint"]["step"] == last["step"]
    following = finish(ranks)
    assert restored_step(following) == last["step"]
    assert following.weights() == uninterrupted(world_size)


@pytest.mark.parametrize("world_size", [1, 2])
def test_resume_after_sigkill_keeps_weights(
    spec: RunSpec, uninterrupted: Callable[[int], bytes], world_size: int, choice: random.Random, tmp_path: Path
) -> None:
    step, rank = choice.randrange(STEPS - 3), choice.randrange(world_size)
    ranks = Ranks(spec, tmp_path / "job", world_size=world_size).start()
    ranks.wait_until(lambda report: report["state"] == "Training" and report.get("step", -1) >= step)
    ranks.send(signal.SIGKILL, rank)
    codes = ranks.wait()
    assert codes[rank] == -signal.SIGKILL
    assert all(code == ExitCode.FABRIC for other, code in enumerate(codes) if other != rank), codes
    assert finish(ranks).weights() == uninterrupted(world_size)


@pytest.mark.parametrize("stage", SaveStage)
def test_resume_after_sigkill_during_a_save_keeps_weights(
    spec: RunSpec, uninterrupted: Callable[[int], bytes], stage: str, tmp_path: Path
) -> None:
    ranks = Ranks(spec, tmp_path / "job", kill_at=(stage, 1), saves_all=True)
    assert ranks.run() == [-signal.SIGKILL], ranks.stderr()
    following = finish(ranks)
    assert restored_step(following) > 0
    assert following.weights() == uninterrupted(1)
    checkpoints = ranks.job_dir / "checkpoints"
    assert [entry.name for entry in checkpoints.iterdir()] == [f"step-{STEPS:08d}-a2"]


@pytest.mark.parametrize("stored", ["fp32", "bf16"])
def test_resumed_ranks_of_a_complete_model_in_bf16_keep_weights(
    base: Path, data: Path, tmp_path: Path, stored: str
) -> None:
    """Two ranks with a working copy of fp32 weights, or with bf16 weights that are rounded stochastically."""
    spec = tiny.make_spec(
        base, data, method="Full", precision="bf16", weightPrecision=stored, ema=True, learningRate=1e-3, steps=STEPS
    )
    complete = Ranks(spec, tmp_path / "complete", world_size=2)
    assert complete.run() == [ExitCode.DONE] * 2, complete.stderr()
    stopped = Ranks(spec, tmp_path / "stopped", world_size=2)
    stopped.start()
    stopped.wait_until(lambda report: report["state"] == "Training" and report.get("step", -1) >= 1)
    stopped.send(signal.SIGTERM, 1)
    assert stopped.wait() == [ExitCode.SAVED] * 2, stopped.stderr()
    finished = finish(stopped)
    assert 0 < restored_step(finished) < STEPS
    name = Path("outputs") / "unet" / "diffusion_pytorch_model.safetensors"
    assert (finished.job_dir / name).read_bytes() == (complete.job_dir / name).read_bytes()
