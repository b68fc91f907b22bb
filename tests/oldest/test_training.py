"""Every method trains, saves, resumes bit-identically and exports with the installed releases.

`make test-oldest` runs these tests, and those of scripts, with the oldest supported releases; `make test` with the
newest ones.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_contract.exit_codes import ExitCode
from finetune_contract.run_spec import RunSpec

pytestmark = pytest.mark.trainer

STEPS = 2
METHODS = ("LoRA, text", "Full", "DreamBoothLoRA", "TextualInversion", "ControlNet")


@pytest.fixture(autouse=True)
def _restored_settings() -> Iterator[None]:
    """Undo the torch settings that a rank in this process changes."""
    yield
    import torch  # noqa: PLC0415  slow to import

    torch.use_deterministic_algorithms(False)
    gc.unfreeze()


@pytest.fixture(name="inputs", scope="module")
def _inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the folders of a tiny base model and of a tiny data set."""
    from testing.trainer import tiny  # noqa: PLC0415  slow to import

    return tiny.write_base(tmp_path_factory.mktemp("base") / "base"), tiny.write_data(
        tmp_path_factory.mktemp("data") / "data"
    )


def _run(spec: RunSpec, job_dir: Path, attempt: int) -> dict[str, bytes]:
    """Run one rank in this process, and return its outputs."""
    from finetune_trainer.report import Reporter  # noqa: PLC0415  slow to import
    from finetune_trainer.train.context import RankContext  # noqa: PLC0415
    from finetune_trainer.train.preemption_notice import PreemptionNotice  # noqa: PLC0415
    from finetune_trainer.train.run import run_rank  # noqa: PLC0415

    context = RankContext(spec, attempt, job_dir, job_dir.parent / "cache", PreemptionNotice(), Reporter(0, None))
    assert run_rank(context, {"OMP_NUM_THREADS": "1"}) is ExitCode.DONE
    folder = job_dir / "outputs"
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}
    assert found
    return found


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_resumes_and_exports(method: str, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    from testing.trainer import tiny  # noqa: PLC0415  slow to import
    from testing.trainer.methods import SETTINGS  # noqa: PLC0415

    options: dict[str, Any] = SETTINGS[method]
    whole = _run(tiny.make_spec(*inputs, **{**options, "steps": STEPS}), tmp_path / "whole" / "job", 1)
    _run(tiny.make_spec(*inputs, **{**options, "steps": 1}), tmp_path / "parts" / "job", 1)
    assert _run(tiny.make_spec(*inputs, **{**options, "steps": STEPS}), tmp_path / "parts" / "job", 2) == whole
