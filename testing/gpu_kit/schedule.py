"""The measurements of the GPU kit, the most important first, and their time limits. Pure.

Each measurement has a guaranteed share of the time. The shares add up to less than the total; what is left, and what
earlier measurements did not use, extends the limit of the next ones. A measurement that hangs therefore takes time
that nobody needs, and never the share of a later one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

TOTAL_SECONDS = 465.0
"""Time for all measurements; the kit has eight minutes in all."""
IMPORT_SECONDS = 60.0
"""Longest time to unpack the wheels and to import the libraries, before the first measurement."""
LEAST_SECONDS = 3.0
"""A measurement with less time than this is not started."""


@dataclass(frozen=True)
class TrainingCase:
    """A model, a method and a resolution to train with.

    Attributes:
        family: architecture of the base; its weights are random.
        method: the fine-tuning method.
        resolution: side of the square images in pixels.
        batch: images per step.
        large_batch: images per step of the second measurement.
        training: settings that differ from the defaults, by their manifest names.
    """

    family: str
    method: str
    resolution: int
    batch: int
    large_batch: int
    training: Mapping[str, Any] = field(default_factory=dict)

    def tiny(self) -> TrainingCase:
        """Return the case with a tiny model, for a trial without a GPU."""
        return replace(self, family="tiny", resolution=32, batch=1, large_batch=2)


LORA = {"lora": {"rank": 4}}
CASES = {
    "sdxl_lora_1024": TrainingCase("sdxl", "LoRA", 1024, 4, 8, LORA),
    "sd15_lora_512": TrainingCase("sd15", "LoRA", 512, 8, 32, LORA),
    "sdxl_controlnet_512": TrainingCase("sdxl", "ControlNet", 512, 4, 16),
    "sdxl_full_1024": TrainingCase("sdxl", "Full", 1024, 2, 4, {"gradientCheckpointing": True}),
    "sdxl_lora_512": TrainingCase("sdxl", "LoRA", 512, 8, 16, LORA),
    "sdxl_controlnet_1024": TrainingCase("sdxl", "ControlNet", 1024, 2, 4),
}
MAIN_CASE = "sdxl_lora_1024"
FIRST_CASES = ("sdxl_lora_1024", "sd15_lora_512", "sdxl_controlnet_512", "sdxl_full_1024")
"""Cases with a required speed. The others are measured last."""
PROFILED_CASES = FIRST_CASES[:3]
_WORDS = {"cudaGraphs": "graphs", "compile": "compile"}
"""Settings in the names of measurements."""
PRESETS = ("8GB", "12GB", "16GB", "24GB", "80GB")
VARIANTS = ((False, False), (True, False), (False, True), (True, True))
"""CUDA graphs and compilation of the variants of the main case."""
COMPILED_CASES = ("sdxl_full_1024", "sdxl_controlnet_512")
"""Further cases with a compiled variant: their jobs are compiled if they are long."""


@dataclass(frozen=True)
class Measurement:
    """One measurement, which runs in its own process group.

    Attributes:
        name: unique name.
        function: the function of `bench.gpu_kit` that measures.
        share: guaranteed time in seconds.
        most: longest time in seconds, if earlier measurements left it.
        arguments: keyword arguments of the function.
    """

    name: str
    function: str
    share: float
    most: float
    arguments: Mapping[str, Any] = field(default_factory=dict)


MACHINE = Measurement("machine", "machine", 25, 25)
"""Describes the device. All measurements need a working device, so the kit makes sure of it first."""
FLOPS = Measurement("flops", "flops", 0, 240)
"""Counts the arithmetic of each case on meta tensors. Uses one core and no GPU, next to the other measurements."""


def measurements(has_gpu: bool) -> tuple[Measurement, ...]:
    """Return all measurements in their order.

    Args:
        has_gpu: whether the device is a GPU; a CPU has no fp16.
    """
    first, second = ("bf16", "fp16") if has_gpu else ("fp32", None)
    return (
        Measurement("job_killed", "job_killed", 50, 150, {"precision": first}),
        Measurement("jobs_compared", "jobs_compared", 40, 150, {"killed": first, "precision": second}),
        *(_training(name) for name in FIRST_CASES),
        Measurement("checkpoint", "checkpoint", 18, 60),
        *(_plain(name) for name in FIRST_CASES),
        *(_variant(MAIN_CASE, {"cudaGraphs": graphs, "compile": compiled}) for graphs, compiled in VARIANTS),
        *(_variant(name, {"compile": True}) for name in COMPILED_CASES),
        *(_large(name) for name in FIRST_CASES),
        *(_training(name) for name in CASES if name not in FIRST_CASES),
        *(_plain(name) for name in CASES if name not in FIRST_CASES),
        *(_large(name) for name in CASES if name not in FIRST_CASES),
        *(Measurement(f"preset_{preset}", "preset", 3.5, 20, {"preset": preset}) for preset in PRESETS),
        Measurement("adamw8bit", "adamw8bit", 5, 30),
    )


def _training(name: str) -> Measurement:
    profiled = name in PROFILED_CASES
    share = 26 if name == MAIN_CASE else 15 if name in FIRST_CASES else 7
    return Measurement(name, "training", share, 110, {"case": name, "profiled": profiled})


def _plain(name: str) -> Measurement:
    return Measurement(f"{name}_plain", "plain", 8 if name in FIRST_CASES else 6, 40, {"case": name})


def _large(name: str) -> Measurement:
    return Measurement(f"{name}_large", "training", 6 if name in FIRST_CASES else 5, 60, {"case": name, "large": True})


def _variant(case: str, settings: dict[str, bool]) -> Measurement:
    text = "_".join(f"{_WORDS[name]}_{_on(value)}" for name, value in settings.items())
    share = 11 if settings["compile"] else 7
    return Measurement(f"{case}_{text}", "training", share, 90, {"case": case, "settings": settings})


def _on(value: bool) -> str:
    return "on" if value else "off"


def select(all_of_them: Sequence[Measurement], names: Iterable[str]) -> tuple[Measurement, ...]:
    """Return the measurements with these names, in their order; all of them without names.

    Raises:
        ValueError: a name is unknown.
    """
    wanted = set(names)
    if unknown := sorted(wanted - {measurement.name for measurement in all_of_them}):
        known = ", ".join(measurement.name for measurement in all_of_them)
        raise ValueError(f"--only: {', '.join(unknown)} is unknown; write names of {known}")
    return tuple(measurement for measurement in all_of_them if not wanted or measurement.name in wanted)


def time_limit(
    planned: Sequence[Measurement], index: int, elapsed: float, total: float = TOTAL_SECONDS, stretch: float = 1.0
) -> float:
    """Return the seconds that a measurement may take; less than LEAST_SECONDS if it should not start.

    Args:
        planned: all measurements in their order.
        index: the next one.
        elapsed: seconds since the start of the kit.
        total: seconds for all measurements.
        stretch: factor of all times, the total included.
    """
    reserved = sum(later.share for later in planned[index + 1 :])
    return min(planned[index].most * stretch, (total - reserved) * stretch - elapsed)
