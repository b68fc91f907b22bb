"""A real run on two ranks reports where its time goes and how many operations it computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune_contract import environment
from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import Performance, StepShares
from finetune_trainer.performance.flops import FLOPS_FILE
from testing.trainer import tiny
from testing.trainer.ranks import Ranks
from tests.trainer.performance.analytic import full_training_flops

pytestmark = pytest.mark.trainer
PEAK = 0.5


def measured(ranks: Ranks, rank: int) -> Performance:
    """Return the newest figures of a rank."""
    found = [report["performance"] for report in ranks.reports(rank) if "performance" in report]
    return Performance.model_validate(found[-1])


def test_two_ranks_report_shares_memory_and_operations(base: Path, data: Path, tmp_path: Path) -> None:
    spec = tiny.make_spec(base, data, method="Full", steps=5)
    extra = {environment.PEAK_TERAFLOPS: str(PEAK), environment.COUNT_AFTER_SECONDS: "0.001"}
    ranks = Ranks(spec, tmp_path / "job", world_size=2, extra=extra)
    assert ranks.run() == [ExitCode.DONE] * 2, ranks.stderr()
    for rank in range(2):
        figures = measured(ranks, rank)
        assert figures.shares is not None
        shares = figures.shares
        assert sum(getattr(shares, name) for name in StepShares.model_fields) == pytest.approx(1)
        # The host is the device, and gloo sums the gradients on it.
        assert shares.host == 0
        assert 0 < shares.exchange < 1
        assert figures.utilization == shares.compute > 0
        assert (figures.memory_allocated_bytes or 0) > 100 * 2**20
        assert figures.memory_total_bytes is None
    first, second = measured(ranks, 0), measured(ranks, 1)
    assert second.settings is None is second.flops_per_second
    assert first.settings is not None
    assert (first.settings.device, first.settings.precision, first.settings.batch_size) == ("cpu", "fp32", 2)
    assert "CPU" in (first.settings.cuda_graphs_off or "")
    assert first.flops_per_second is not None
    assert first.share_of_peak == pytest.approx(first.flops_per_second / (PEAK * 1e12))
    stored = json.loads((ranks.job_dir / FLOPS_FILE).read_text())["perSample"]
    analytic = full_training_flops(base / "unet", tiny.NUM_TOKENS)
    assert stored == {"4x8x8": pytest.approx(analytic, rel=0.01)}
