"""The ratios that `make bench-cpu` reports."""

from __future__ import annotations

import pytest

from finetune_contract.spec import Precision
from finetune_trainer.intel.paths import ComputePath
from testing.measure.cpu_ratios import WIRE_METHOD, all_paths, combine, configurations, measured_together, summarize

pytestmark = pytest.mark.trainer

BF16 = ComputePath(Precision.BF16)
READINGS = {
    "fp32 native": [4.0, 5.0],
    "bf16 native": [2.0, 9.0],
    "bf16 with IPEX": [2.5, 2.5],
    "2 ranks": [1.6, 2.0],
    "2 ranks, not pinned": [3.2, 2.4],
    "2 ranks, bf16 wire": [1.5, 1.6],
}


def test_ratios_are_those_of_the_best_rounds() -> None:
    found = summarize(BF16, READINGS)
    assert found == {
        "auto_over_best": 1.0,
        "bf16_speedup": 2.0,
        "two_ranks_speedup": 1.25,
        "pinned_speedup": pytest.approx(1.5),
        "ipex_speedup": 0.8,
        "bf16_wire_speedup": pytest.approx(1.6 / 1.5),
    }
    # A wrong choice is visible.
    assert summarize(ComputePath(Precision.BF16, True), READINGS)["auto_over_best"] == 1.25


def test_the_last_line_has_the_worst_choice_of_all_methods() -> None:
    worse = {**READINGS, "bf16 native": [3.0]}
    result = combine({"LoRA": summarize(BF16, READINGS), "Full": summarize(BF16, worse)})
    assert result["auto_over_best"] == 1.2
    assert result["pinned_speedup"] == 1.5
    assert result["LoRA_bf16_speedup"] == 2.0


def test_each_comparison_has_its_configurations() -> None:
    paths = all_paths(has_ipex=True)
    assert [path.name for path in paths] == ["fp32 native", "bf16 native", "fp32 with IPEX", "bf16 with IPEX"]
    names = [each.name for each in configurations(WIRE_METHOD, paths, BF16)]
    assert names == [*(path.name for path in paths), "2 ranks", "2 ranks, not pinned", "2 ranks, bf16 wire"]
    assert all_paths(has_ipex=False) == paths[:2]


def test_ranks_that_are_compared_run_together() -> None:
    paths = all_paths(has_ipex=True)
    auto = paths[1]
    one, two = measured_together(configurations(WIRE_METHOD, paths, auto), auto).values()
    assert [each.name for each in one] == [path.name for path in paths]
    assert [each.name for each in two] == [auto.name, "2 ranks", "2 ranks, not pinned", "2 ranks, bf16 wire"]
