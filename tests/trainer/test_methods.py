"""Every method on every family: trained end to end by real ranks, and resumed bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_contract.exit_codes import ExitCode
from finetune_contract.run_spec import RunSpec
from tests.trainer import tiny
from tests.trainer.methods import SETTINGS
from tests.trainer.ranks import Ranks

pytestmark = pytest.mark.trainer

STEPS = 4
OPTIONS = {
    "steps": STEPS,
    "randomFlip": True,
    "captionDropout": 0.3,
    "noiseOffset": 0.1,
    "inputPerturbation": 0.1,
    "snrGamma": 5,
}
CASES = [(method, family) for method in SETTINGS for family in tiny.FAMILIES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of all jobs of this module, which share one cache."""
    return tmp_path_factory.mktemp("methods")


def world_size_of(case: tuple[str, str]) -> int:
    """Every method runs on one rank and on two, every family too; not each with each."""
    return 1 + CASES.index(case) % 2


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} on {case[1]}")
def test_stopped_and_resumed_ends_with_the_same_bytes(
    case: tuple[str, str], bases: dict[str, Path], data: Path, folder: Path, tmp_path: Path
) -> None:
    method, family = case
    world_size = world_size_of(case)
    spec = tiny.make_spec(bases[family], data, **OPTIONS, **SETTINGS[method])
    whole = Ranks(spec, folder / f"{method}-{family}", world_size=world_size)
    # Killed as the checkpoint after two steps is there, and the one after four is not.
    halves = Ranks(spec, folder / f"{method}-{family}-halves", world_size=world_size, kill_at=("rename", 1))
    for ranks in (whole.start(), halves.start()):
        ranks.wait()
    assert [process.exitcode for process in whole.processes] == [ExitCode.DONE] * world_size, whole.stderr()
    rest = Ranks(spec, halves.folder, 2, world_size)
    assert rest.run() == [ExitCode.DONE] * world_size, rest.stderr()
    assert any(report.get("restoredStep") == 2 for report in rest.reports())
    assert read_outputs(rest) == read_outputs(whole)
    del tmp_path


def read_outputs(ranks: Ranks) -> dict[str, bytes]:
    folder = ranks.job_dir / "outputs"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_textual_inversion_saves_kilobytes(base: Path, data: Path, folder: Path) -> None:
    spec: RunSpec = tiny.make_spec(base, data, steps=2, **SETTINGS["TextualInversion"])
    ranks = Ranks(spec, folder / "small")
    assert ranks.run() == [ExitCode.DONE], ranks.stderr()
    (checkpoint,) = (ranks.job_dir / "checkpoints").iterdir()
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) < 8192
