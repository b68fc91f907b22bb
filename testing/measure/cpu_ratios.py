"""What `make bench-cpu` measures, and the ratios that it reports."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from finetune_contract.spec import ExchangePrecision, Precision
from finetune_trainer.intel.paths import ComputePath

WIRE_METHOD = "Full"
"""The method whose exchange is measured: it exchanges all weights."""
Readings = Mapping[str, Sequence[float]]
"""Seconds of a step in each round, by the name of the configuration."""


@dataclass(frozen=True)
class Configuration:
    """A measured configuration.

    Attributes:
        name: name in the table.
        method: the method.
        path: number format and library.
        num_ranks: ranks; each has an equal share of the cores as threads.
        is_pinned: whether each rank keeps to its own cores.
        wire: number format of the exchanged gradients.
    """

    name: str
    method: str
    path: ComputePath
    num_ranks: int = 1
    is_pinned: bool = True
    wire: ExchangePrecision = ExchangePrecision.FP32

    def to_json(self) -> str:
        """Return the configuration as an argument of a rank."""
        return json.dumps(
            {
                "method": self.method,
                "precision": self.path.precision.value,
                "ipex": self.path.uses_ipex,
                "ranks": self.num_ranks,
                "wire": self.wire.value,
            }
        )


def all_paths(has_ipex: bool) -> list[ComputePath]:
    """Return the paths to measure, the simplest one first."""
    uses = (False, True) if has_ipex else (False,)
    return [ComputePath(precision, use) for use in uses for precision in (Precision.FP32, Precision.BF16)]


def configurations(method: str, paths: Sequence[ComputePath], auto: ComputePath) -> list[Configuration]:
    """Return the configurations of a method. Those of several ranks use the path that auto chooses."""
    found = [Configuration(path.name, method, path) for path in paths]
    found.append(Configuration("2 ranks", method, auto, 2))
    found.append(Configuration("2 ranks, not pinned", method, auto, 2, is_pinned=False))
    if method == WIRE_METHOD:
        found.append(Configuration("2 ranks, bf16 wire", method, auto, 2, wire=ExchangePrecision.BF16))
    return found


def measured_together(found: Sequence[Configuration], auto: ComputePath) -> dict[str, list[Configuration]]:
    """Return the configurations of each part of a measurement: the processes of all would need too much memory."""
    return {
        "one rank": [each for each in found if each.num_ranks == 1],
        "two ranks": [each for each in found if each.num_ranks > 1 or each.name == auto.name],
    }


def summarize(auto: ComputePath, readings: Readings) -> dict[str, float]:
    """Return the ratios of a method, of the best rounds."""
    best = {name: min(seconds) for name, seconds in readings.items()}
    paths = [name for name in best if not name.startswith("2 ranks")]
    native = [name for name in paths if name.endswith("native")]
    ipex = [name for name in paths if name not in native]
    found = {
        "auto_over_best": best[auto.name] / min(best[name] for name in paths),
        "bf16_speedup": best["fp32 native"] / best["bf16 native"],
        "two_ranks_speedup": best[auto.name] / best["2 ranks"],
        "pinned_speedup": best["2 ranks, not pinned"] / best["2 ranks"],
    }
    if ipex:
        found["ipex_speedup"] = min(best[name] for name in native) / min(best[name] for name in ipex)
    if "2 ranks, bf16 wire" in best:
        found["bf16_wire_speedup"] = best["2 ranks"] / best["2 ranks, bf16 wire"]
    return found


def combine(found: Mapping[str, Mapping[str, float]]) -> dict[str, object]:
    """Return the last line: the worst `auto_over_best`, the mean pinned speedup, and all ratios by method."""
    result: dict[str, object] = {
        "auto_over_best": round(max(each["auto_over_best"] for each in found.values()), 3),
        "pinned_speedup": round(statistics.geometric_mean(each["pinned_speedup"] for each in found.values()), 3),
    }
    for method, ratios in found.items():
        result |= {f"{method}_{name}": round(ratio, 3) for name, ratio in ratios.items()}
    return result
