"""Number of operations that a step dispatches: a GPU's host needs about 30 us for each."""

from __future__ import annotations

import pytest

from testing.measure.launches import SD15_LORA, SDXL_LORA, LaunchCase, count_operations

SD15_CONTROLNET = LaunchCase("sd15", "ControlNet", 512, 8)


@pytest.mark.parametrize(
    ("case", "limit"),
    [(SDXL_LORA, 7400), (SD15_LORA, 2200), (SD15_CONTROLNET, 3500)],
    ids=["SDXL LoRA", "SD 1.5 LoRA", "SD 1.5 ControlNet"],
)
def test_a_step_dispatches_few_operations(case: LaunchCase, limit: int) -> None:
    counts = count_operations(case, steps=1)
    assert counts["geglu"] >= counts["geglu_backward"] > 0, "the fused operations are used"
    assert limit * 0.8 < counts.total() <= limit, counts.most_common(10)
