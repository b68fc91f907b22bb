"""The kit's result: headline figures, a table, and one JSON object. Pure.

The object has the required figures by name, null if one is missing; `errors` says why. See `bench/gpu_kit/measure.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from testing.gpu_kit.records import Outcome
from testing.gpu_kit.schedule import CASES, FLOPS, MACHINE, PRESETS

_DIGITS = 4
_COLUMNS = {
    "s/step": "seconds_per_step",
    "images/s": "images_per_second",
    "share of peak": "share_of_peak",
    "peak GiB": "peak_gib",
    "first step s": "first_step_seconds",
}
_WIDTH = 140
HEADER = ["measurement", *_COLUMNS, "result", "took s"]


def summarize(outcomes: Mapping[str, Outcome], seconds: float, tiny: bool) -> dict[str, Any]:
    """Return the result of all measurements so far.

    Args:
        outcomes: what was measured, by name; measurements that have not run are absent.
        seconds: time since the start of the kit.
        tiny: whether tiny models were used, whose figures mean nothing.
    """
    values = {name: dict(outcome.values) for name, outcome in outcomes.items()}
    machine = values.get(MACHINE.name, {})
    for share, count in (("share_of_peak", "flops_per_image"), ("model_share_of_peak", "model_flops_per_image")):
        _add_shares(values, share, machine.get("peak_flops"), values.get(FLOPS.name, {}).get(count, {}))
    restarts = {found["victim"]: found for found in values.get("job_killed", {}).get("restarts", ())}
    result: dict[str, Any] = {
        "sdxl_lora_1024_share_of_peak": _get(values, "sdxl_lora_1024", "share_of_peak"),
        "sd15_lora_512_share_of_peak": _get(values, "sd15_lora_512", "share_of_peak"),
        "sdxl_controlnet_512_images_per_second": _get(values, "sdxl_controlnet_512", "images_per_second"),
        "sdxl_full_1024_share_of_peak": _get(values, "sdxl_full_1024", "share_of_peak"),
        "failure_to_first_step_seconds": restarts.get("rank", {}).get("failure_to_first_step_seconds"),
        "checkpoint_stall_ratio": _get(values, "checkpoint", "stall_ratio"),
        "pod_loss_to_first_step_seconds": restarts.get("pod", {}).get("failure_to_first_step_seconds"),
        "restart_phases": {victim: found["phases"] for victim, found in restarts.items()},
        "weights": {
            name.removesuffix("_weights"): found
            for name, found in values.get("jobs_compared", {}).items()
            if name.endswith("_weights")
        },
        **_speedups(values),
        **_best_settings(values),
        "presets": {preset: values[f"preset_{preset}"] for preset in PRESETS if values.get(f"preset_{preset}")},
        "device": machine.get("device"),
        "tiny": tiny,
        "seconds": seconds,
        "errors": {name: outcome.error for name, outcome in outcomes.items() if outcome.error is not None},
        "measurements": values,
    }
    rounded: dict[str, Any] = _round(result)
    return rounded


def _add_shares(
    values: Mapping[str, dict[str, Any]], share: str, peak: float | None, flops: Mapping[str, float]
) -> None:
    """Add the share of the device's peak to each measurement of the product's speed."""
    for found in values.values():
        per_image = flops.get(found.get("case", ""))
        if peak and per_image and "images_per_second" in found:
            found[share] = found["images_per_second"] * per_image / peak


def _speedups(values: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Return how many times as many images per second the product trains as the plain loop, by case."""
    speedups: dict[str, float | None] = {}
    for case in CASES:
        ours, theirs = (_get(values, name, "images_per_second") for name in (case, f"{case}_plain"))
        speedups[f"{case}_speedup"] = ours / theirs if ours and theirs else None
    return speedups


def _best_settings(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the fastest measurement of each case with its first batch size, and its speed."""
    best: dict[str, Any] = {}
    for case in CASES:
        names = [name for name in values if re.fullmatch(rf"{case}(_graphs_\w+)?(_compile_\w+)?", name)]
        speeds = {name: speed for name in names if (speed := _get(values, name, "images_per_second"))}
        fastest = max(speeds, key=lambda name: speeds[name], default=None)
        best[f"{case}_best"] = fastest
        best[f"{case}_best_images_per_second"] = speeds.get(fastest or "")
    return best


def _get(values: Mapping[str, Mapping[str, Any]], *keys: str) -> Any:
    found: Any = values
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _round(value: Any) -> Any:
    """Round all numbers to a few significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _round(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_round(inner) for inner in value]
    return value


def rows(result: Mapping[str, Any], outcomes: Mapping[str, Outcome]) -> list[list[object]]:
    """Return the rows of the table: one for each measurement, in their order."""
    table: list[list[object]] = []
    for name, outcome in outcomes.items():
        found = result["measurements"].get(name, {})
        cells = [found.get(key, "") for key in _COLUMNS.values()]
        shown = ["" if cell is None else cell for cell in cells]
        table.append([name, *shown, _describe(found, outcome), f"{outcome.seconds:.0f}"])
    return table


_DESCRIBED = {
    "stall_ratio": "stall / accelerate's {:.3f}",
    "extra_seconds_mean": "extra time of a step {:.3f} s",
    "extra_seconds_max": "at most {:.3f} s",
    "estimate_gib": "estimate {:.1f} GiB",
    "adamw_peak_gib": "with AdamW {:.1f} GiB",
}


def _describe(found: Mapping[str, Any], outcome: Outcome) -> str:
    """Return what the columns do not show, and the error."""
    parts = [text.format(found[key]) for key, text in _DESCRIBED.items() if isinstance(found.get(key), int | float)]
    parts += [
        f"restart of the {restart['victim']} {restart['failure_to_first_step_seconds']:.1f} s"
        for restart in found.get("restarts", ())
    ]
    for key, weights in found.items():
        if key.endswith("_weights"):
            what = "equal" if weights["bit_identical"] else f"differ by {weights['largest_difference']:.1e}"
            parts.append(f"{key.removesuffix('_weights')}: weights {what}")
    if isinstance(profile := found.get("profile"), Mapping):
        parts.append(f"{profile['launches_per_step']:.0f} launches")
        if profile["device_utilisation"] is not None:
            parts.append(f"device busy {profile['device_utilisation']:.0%}")
    if outcome.error is not None:
        parts.append(f"error: {' '.join(outcome.error.split())}")
    text = "; ".join(parts)
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."
