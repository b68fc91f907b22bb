"""Jobs whose ranks send bf16 gradients."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_contract.exit_codes import ExitCode
from finetune_contract.spec import ExchangePrecision
from testing.trainer import tiny
from testing.trainer.ranks import Ranks

pytestmark = pytest.mark.trainer


def test_a_resumed_job_ends_with_the_weights_of_an_undisturbed_one(base: Path, data: Path, tmp_path: Path) -> None:
    spec = tiny.make_spec(base, data, exchangePrecision=ExchangePrecision.BF16)
    undisturbed = Ranks(spec, tmp_path / "undisturbed", world_size=2)
    assert undisturbed.run() == [ExitCode.DONE] * 2, undisturbed.stderr()
    # The first attempt ends after half of the steps.
    half = spec.model_copy(update={"training": spec.training.model_copy(update={"steps": 3})})
    first = Ranks(half, tmp_path / "job", world_size=2)
    assert first.run() == [ExitCode.DONE] * 2, first.stderr()
    resumed = Ranks(spec, tmp_path / "job", 2, world_size=2)
    assert resumed.run() == [ExitCode.DONE] * 2, resumed.stderr()
    assert resumed.reports()[-1]["restoredStep"] == 3
    assert resumed.weights() == undisturbed.weights()
    # The numbers are really rounded.
    exact = Ranks(tiny.make_spec(base, data), tmp_path / "exact", world_size=2)
    assert exact.run() == [ExitCode.DONE] * 2, exact.stderr()
    assert exact.weights() != undisturbed.weights()
