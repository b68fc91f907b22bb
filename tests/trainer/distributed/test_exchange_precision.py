"""Jobs whose ranks send bf16 gradients."""

from __future__ import annotations

import signal
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
    preempted = Ranks(spec, tmp_path / "job", world_size=2).start()
    preempted.wait_until(lambda report: report.get("step", -1) >= 2)
    preempted.send(signal.SIGTERM, 1)
    assert preempted.wait() == [ExitCode.SAVED] * 2, preempted.stderr()
    resumed = Ranks(spec, tmp_path / "job", 2, world_size=2)
    assert resumed.run() == [ExitCode.DONE] * 2, resumed.stderr()
    assert resumed.weights() == undisturbed.weights()
    # The numbers are really rounded.
    exact = Ranks(tiny.make_spec(base, data), tmp_path / "exact", world_size=2)
    assert exact.run() == [ExitCode.DONE] * 2, exact.stderr()
    assert exact.weights() != undisturbed.weights()
