"""Every method on every family: trained end to end, and resumed with bit-identical results."""

from __future__ import annotations

import gc
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from finetune_contract.exit_codes import ExitCode
from finetune_contract.run_spec import RunSpec
from finetune_contract.spec import Method as MethodName
from finetune_trainer.report import Reporter
from finetune_trainer.train.context import RankContext
from finetune_trainer.train.preemption_notice import PreemptionNotice
from finetune_trainer.train.run import run_rank
from testing.trainer import tiny
from testing.trainer.methods import SETTINGS
from testing.trainer.ranks import Ranks

pytestmark = pytest.mark.trainer

STEPS = 6
OPTIONS = {
    "steps": STEPS,
    "randomFlip": True,
    "captionDropout": 0.3,
    "noiseOffset": 0.1,
    "inputPerturbation": 0.1,
    "snrGamma": 5,
    "timestepBias": {"strategy": "later"},
}
CASES = [(method, family) for method in SETTINGS for family in tiny.FAMILIES]
ON_TWO_RANKS = {
    "LoRA": ["sd1"],
    "LoRA, text": ["sd2", "sdxl"],
    "Full": tiny.FAMILIES,
    "DreamBooth": ["sd1"],
    "DreamBooth, text": ["sd2", "sdxl"],
    "DreamBoothLoRA": tiny.FAMILIES,
    "TextualInversion": tiny.FAMILIES,
    "ControlNet": tiny.FAMILIES,
}
"""Families on which each entry of SETTINGS runs with two ranks: each method once on each family."""
PAIRS = [(name, family) for name, families in ON_TWO_RANKS.items() for family in families]


@pytest.fixture(scope="module", autouse=True)
def _restored_settings() -> Iterator[None]:
    """Undo the torch settings that a rank in this process changes."""
    yield
    torch.use_deterministic_algorithms(False)
    gc.unfreeze()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of all jobs of this module; they share one cache."""
    return tmp_path_factory.mktemp("methods")


class StoppingReporter(Reporter):
    """Triggers the preemption notice after a step."""

    def __init__(self, notice: PreemptionNotice, step: int) -> None:
        super().__init__(0, None)
        self._notice = notice
        self._last = step

    def progress(self, step: int, loss: float, images_per_second: float | None) -> None:
        super().progress(step, loss, images_per_second)
        if step == self._last:
            self._notice.give()


def run_here(spec: RunSpec, job_dir: Path, attempt: int = 1, stop_at: int | None = None) -> ExitCode:
    """Run one rank in this process; trigger the preemption notice after step `stop_at`, if given."""
    notice = PreemptionNotice()
    reporter = Reporter(0, None) if stop_at is None else StoppingReporter(notice, stop_at)
    context = RankContext(spec, attempt, job_dir, job_dir.parent / "cache", notice, reporter)
    return run_rank(context, {"OMP_NUM_THREADS": "1"})


def read_outputs(job_dir: Path) -> dict[str, bytes]:
    folder = job_dir / "outputs"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} on {case[1]}")
def test_stopped_and_resumed_run_writes_the_same_bytes(
    case: tuple[str, str], bases: dict[str, Path], data: Path, folder: Path
) -> None:
    method, family = case
    spec = tiny.make_spec(bases[family], data, **OPTIONS, **SETTINGS[method])
    full_run, resumed = folder / f"{method}-{family}", folder / f"{method}-{family}-resumed"
    assert run_here(spec, full_run) is ExitCode.DONE
    assert run_here(spec, resumed, stop_at=2) is ExitCode.SAVED
    assert run_here(spec, resumed, attempt=2) is ExitCode.DONE
    assert read_outputs(resumed) == read_outputs(full_run)
    assert read_outputs(full_run)


@pytest.mark.parametrize("case", PAIRS, ids=lambda case: f"{case[0]} on {case[1]}")
def test_killed_and_resumed_run_on_two_ranks_writes_the_same_bytes(
    case: tuple[str, str], bases: dict[str, Path], data: Path, folder: Path
) -> None:
    method, family = case
    spec = tiny.make_spec(bases[family], data, **OPTIONS, **SETTINGS[method])
    resumed = Ranks(spec, folder / f"{method}-{family}-two", world_size=2, kill_at=("rename", 1), saves_all=True)
    resumed.run()
    rest = Ranks(spec, resumed.folder, 2, 2)
    full_run = Ranks(spec, folder / f"{method}-{family}-full_run", world_size=2)
    for ranks in (rest.start(), full_run.start()):
        assert ranks.wait() == [ExitCode.DONE] * 2, ranks.stderr()
    assert any(report.get("restoredStep", 0) > 0 for report in rest.reports())
    assert read_outputs(rest.job_dir) == read_outputs(full_run.job_dir)


def test_two_rank_cases_cover_each_method_on_each_family() -> None:
    tried = [(SETTINGS[name]["method"], family) for name, family in PAIRS]
    assert sorted(tried) == sorted(itertools.product([method.value for method in MethodName], tiny.FAMILIES))


def test_textual_inversion_checkpoints_are_small(base: Path, data: Path, folder: Path) -> None:
    spec = tiny.make_spec(base, data, steps=2, **SETTINGS["TextualInversion"])
    assert run_here(spec, folder / "small") is ExitCode.DONE
    checkpoints = [path for path in (folder / "small" / "checkpoints").iterdir() if path.name.startswith("step-")]
    for checkpoint in checkpoints:
        assert sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()) < 10_000
    assert checkpoints


@pytest.mark.parametrize("method", ["LoRA", "Full"])
def test_fp16_run_resumes_with_its_loss_scale(method: str, base: Path, data: Path, folder: Path) -> None:
    options = {"precision": "fp16", "optimizer": "prodigy", "learningRate": 1}
    spec = tiny.make_spec(base, data, **{**OPTIONS, **options, "steps": 4}, **SETTINGS[method])
    full_run, resumed = folder / f"fp16-{method}", folder / f"fp16-{method}-resumed"
    assert run_here(spec, full_run) is ExitCode.DONE
    assert run_here(spec, resumed, stop_at=2) is ExitCode.SAVED
    assert run_here(spec, resumed, attempt=2) is ExitCode.DONE
    assert read_outputs(resumed) == read_outputs(full_run)
    scales = [loss_scale(job_dir) for job_dir in (full_run, resumed)]
    assert scales[0] == scales[1]
    assert scales[0]["value"] > 0


def loss_scale(job_dir: Path) -> dict[str, float]:
    """Return the loss scale in the checkpoint of step 4."""
    (state,) = (job_dir / "checkpoints").glob("step-*4-a*/state.json")
    scale: dict[str, float] = json.loads(state.read_text(encoding="utf-8"))["lossScale"]
    return scale
