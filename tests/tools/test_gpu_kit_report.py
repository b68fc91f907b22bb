"""The GPU kit's order and limits, its records and its report, without its measurements."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from testing.gpu_kit import schedule
from testing.gpu_kit.records import Outcome, Recorder, read_records
from testing.gpu_kit.restarts import BEFORE, phases
from testing.gpu_kit.schedule import (
    CASES,
    FIRST_CASES,
    IMPORT_SECONDS,
    LEAST_SECONDS,
    MACHINE,
    TOTAL_SECONDS,
    measurements,
    select,
    time_limit,
)
from testing.gpu_kit.summary import HEADER, rows, summarize
from testing.gpu_kit.trace import TraceEvent, busy_nanoseconds
from testing.gpu_kit.trace import summarize as summarize_trace

ROOT = Path(__file__).parents[2]
KIT = ROOT / "bench" / "gpu_kit"
REQUIRED = (
    "sdxl_lora_1024_share_of_peak",
    "sd15_lora_512_share_of_peak",
    "sdxl_controlnet_512_images_per_second",
    "sdxl_full_1024_share_of_peak",
    "failure_to_first_step_seconds",
    "checkpoint_stall_ratio",
)
"""Figures with a required value."""


@pytest.mark.parametrize("has_gpu", [True, False])
def test_every_measurement_keeps_its_share_if_all_earlier_ones_hang(has_gpu: bool) -> None:
    planned = measurements(has_gpu)
    # The machine is examined twice if a forked process cannot use the device.
    elapsed = IMPORT_SECONDS + 2 * MACHINE.most
    for index, measurement in enumerate(planned):
        limit = time_limit(planned, index, elapsed)
        assert limit >= max(measurement.share, LEAST_SECONDS), measurement.name
        elapsed += limit
    assert elapsed <= TOTAL_SECONDS < 8 * 60


def test_a_limit_uses_the_time_that_earlier_measurements_left_and_never_more_than_the_most() -> None:
    planned = measurements(has_gpu=True)
    last = len(planned) - 1
    assert time_limit(planned, last, 0.0) == planned[last].most
    assert time_limit(planned, last, TOTAL_SECONDS - 7.0) == pytest.approx(7.0)
    assert time_limit(planned, last, TOTAL_SECONDS) < LEAST_SECONDS
    assert time_limit(planned, last, 2 * TOTAL_SECONDS - 7.0, stretch=2.0) == pytest.approx(7.0)


def test_the_most_important_measurements_come_first() -> None:
    names = [measurement.name for measurement in measurements(has_gpu=True)]
    assert names[:6] == ["job_killed", "jobs_compared", *FIRST_CASES]
    assert len(names) == len(set(names))
    for case in CASES:
        assert {case, f"{case}_large", f"{case}_plain"} <= set(names)
    of_main = [name for name in names if name.startswith("sdxl_lora_1024_graphs_")]
    assert len(of_main) == 4
    assert {"sdxl_full_1024_compile_on", "sdxl_controlnet_512_compile_on"} <= set(names)
    profiled = [each.name for each in measurements(has_gpu=True) if each.arguments.get("profiled")]
    assert profiled == ["sdxl_lora_1024", "sd15_lora_512", "sdxl_controlnet_512"]


def test_jobs_use_both_low_precisions_on_a_gpu() -> None:
    killed, compared, *_ = measurements(has_gpu=True)
    assert killed.arguments == {"precision": "bf16"}
    assert compared.arguments == {"killed": "bf16", "precision": "fp16"}


def test_selected_measurements_keep_their_order() -> None:
    planned = measurements(has_gpu=True)
    assert [each.name for each in select(planned, ["checkpoint", "job_killed"])] == ["job_killed", "checkpoint"]
    assert select(planned, []) == planned
    with pytest.raises(ValueError, match="--only: speed is unknown; write names of job_killed, "):
        select(planned, ["speed"])


def test_every_function_of_a_measurement_exists() -> None:
    tree = ast.parse((KIT / "items.py").read_text(encoding="utf-8"))
    modules: dict[str, str] = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "MODULES"
    )
    used = [*measurements(has_gpu=True), MACHINE, schedule.FLOPS]
    assert {each.function for each in used} == set(modules)
    for each in used:
        module = ast.parse((KIT / f"{modules[each.function]}.py").read_text(encoding="utf-8"))
        found = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == each.function]
        assert len(found) == 1, each.function
        names = {argument.arg for argument in found[0].args.args}
        assert {"context", *each.arguments} <= names, each.function


def test_records_survive_a_crash_in_the_middle_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    assert read_records(path) == Outcome()
    record = Recorder(path)
    record.add(seconds_per_step=2.0, batch=4)
    record.add(seconds_per_step=1.0)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"values": {"peak_gib": 1')
    assert read_records(path) == Outcome(values={"seconds_per_step": 1.0, "batch": 4})
    path.write_text("", encoding="utf-8")
    record.error("out of memory")
    record.done()
    assert read_records(path) == Outcome(error="out of memory", done=True)


def test_phases_of_a_restart_add_up_and_ignore_the_killed_rank() -> None:
    states = [
        (1.0, "starting"),
        (2.0, "training"),
        (10.1, "saving"),
        (12.0, "starting"),
        (13.0, "loading"),
        (13.5, "caching"),
        (14.0, "loading"),
        (16.0, "restoring"),
        (16.5, "training"),
        (30.0, "exporting"),
    ]
    found = phases(states, killed_at=10.0, next_step=17.0)
    assert found == {BEFORE: 2.0, "starting": 1.0, "loading": 2.5, "caching": 0.5, "restoring": 0.5, "training": 0.5}
    assert sum(found.values()) == 7.0


def test_a_profile_counts_launches_and_the_busy_time_of_overlapping_kernels() -> None:
    milli = 1_000_000
    events = [
        TraceEvent("gemm", True, 0, 4 * milli),
        TraceEvent("norm", True, 2 * milli, 4 * milli),
        TraceEvent("gemm", True, 10 * milli, 2 * milli),
        TraceEvent("cudaLaunchKernel", False, 0, 10),
        TraceEvent("cuLaunchKernelEx", False, 5, 10),
        TraceEvent("cudaGraphLaunch", False, 9, 10),
        TraceEvent("cudaStreamSynchronize", False, 9, 10),
        TraceEvent("aten::mm", False, 9, 10),
    ]
    assert busy_nanoseconds(event for event in events if event.on_device) == 8 * milli
    found = summarize_trace(events, num_steps=2, step_seconds=0.008)
    assert found["kernels_per_step"] == 1.5
    assert found["launches_per_step"] == 1.5
    assert found["device_busy_seconds_per_step"] == pytest.approx(0.004)
    assert found["device_utilisation"] == pytest.approx(0.5)
    assert found["top"] == [
        {"name": "gemm", "milliseconds": 3.0, "calls": 1.0, "share": 0.6},
        {"name": "norm", "milliseconds": 2.0, "calls": 0.5, "share": 0.4},
    ]


def test_a_profile_without_a_device_shows_operations() -> None:
    found = summarize_trace([TraceEvent("aten::mm", False, 0, 10), TraceEvent("step", False, 0, 99)], 1, 1.0)
    assert [each["name"] for each in found["top"]] == ["aten::mm"]
    assert found["device_utilisation"] is None


def outcomes() -> dict[str, Outcome]:
    rank = {"victim": "rank", "failure_to_first_step_seconds": 4.5, "phases": {BEFORE: 4.5}}
    weights = {"bit_identical": False, "largest_difference": 2e-5, "within_tolerance": True}
    return {
        "machine": Outcome({"peak_flops": 1e15, "device": "a GPU"}),
        "flops": Outcome(
            {
                "flops_per_image": {"sdxl_lora_1024": 1e13, "sdxl_full_1024": 2e13},
                "model_flops_per_image": {"sdxl_lora_1024": 1e13, "sdxl_full_1024": 1.5e13},
            }
        ),
        "job_killed": Outcome({"restarts": [rank, {**rank, "victim": "pod", "failure_to_first_step_seconds": 9.0}]}),
        "jobs_compared": Outcome({"bf16-killed_weights": weights}),
        "sdxl_lora_1024": Outcome({"case": "sdxl_lora_1024", "images_per_second": 25.0, "seconds_per_step": 0.16}),
        "sdxl_lora_1024_plain": Outcome({"case": "sdxl_lora_1024", "images_per_second": 5.0}),
        "sdxl_full_1024": Outcome({"case": "sdxl_full_1024", "images_per_second": 10.0}),
        "sdxl_controlnet_512": Outcome({"images_per_second": 33.3333333}),
        "sdxl_lora_1024_graphs_on_compile_on": Outcome({"case": "sdxl_lora_1024", "images_per_second": 30.0}),
        "sdxl_lora_1024_graphs_on_compile_off": Outcome(error="CUDA error"),
        "checkpoint": Outcome({"stall_ratio": 0.012}),
        "preset_8GB": Outcome({"estimate_gib": 7.0, "peak_gib": 7.5}, seconds=3.2),
    }


def test_the_result_has_the_required_figures() -> None:
    result = summarize(outcomes(), 400.0, tiny=False)
    assert result["sdxl_lora_1024_share_of_peak"] == 0.25
    assert result["sd15_lora_512_share_of_peak"] is None
    assert result["sdxl_controlnet_512_images_per_second"] == 33.33
    assert result["sdxl_full_1024_share_of_peak"] == 0.2
    assert result["measurements"]["sdxl_full_1024"]["model_share_of_peak"] == 0.15
    assert result["failure_to_first_step_seconds"] == 4.5
    assert result["pod_loss_to_first_step_seconds"] == 9.0
    assert result["restart_phases"] == {"rank": {BEFORE: 4.5}, "pod": {BEFORE: 4.5}}
    assert result["checkpoint_stall_ratio"] == 0.012
    assert result["weights"]["bf16-killed"]["within_tolerance"] is True
    assert result["sdxl_lora_1024_speedup"] == 5.0
    assert result["sdxl_lora_1024_best"] == "sdxl_lora_1024_graphs_on_compile_on"
    assert result["sdxl_lora_1024_best_images_per_second"] == 30.0
    assert result["sdxl_full_1024_best"] == "sdxl_full_1024"
    assert result["presets"] == {"8GB": {"estimate_gib": 7.0, "peak_gib": 7.5}}
    assert result["errors"] == {"sdxl_lora_1024_graphs_on_compile_off": "CUDA error"}


def test_a_result_without_any_measurement_has_all_keys() -> None:
    full, empty = summarize(outcomes(), 1.0, tiny=True), summarize({}, 1.0, tiny=True)
    assert set(full) == set(empty)
    assert [empty[key] for key in REQUIRED] == [None] * len(REQUIRED)


def test_the_table_has_a_row_for_each_measurement() -> None:
    result = summarize(outcomes(), 1.0, tiny=False)
    table = {str(row[0]): row for row in rows(result, outcomes())}
    assert list(table) == list(outcomes())
    assert {len(row) for row in table.values()} == {len(HEADER)}
    assert table["sdxl_lora_1024"][1:4] == [0.16, 25.0, 0.25]
    assert table["job_killed"][-2] == "restart of the rank 4.5 s; restart of the pod 9.0 s"
    assert table["jobs_compared"][-2] == "bf16-killed: weights differ by 2.0e-05"
    assert table["preset_8GB"][-2:] == ["estimate 7.0 GiB", "3"]


@pytest.mark.parametrize("page", [KIT / "measure.py", ROOT / "docs" / "methods.md"], ids=["script", "documentation"])
def test_every_key_of_the_result_is_documented(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    keys: dict[str, Any] = summarize({}, 0.0, tiny=False)
    missing = [key for key in keys if not re.search(rf"\b({key}|{re.sub('|'.join(CASES), 'CASE', key)})\b", text)]
    assert missing == []
