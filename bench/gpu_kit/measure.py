"""Measures finetune-operator on this machine: python measure.py --out FOLDER

Needs Python as named in kit.json, torch with CUDA, transformers, accelerate and peft. Needs no network, no installation
and no root: it unpacks the wheels in this folder that the machine lacks into a temporary folder.

It takes at most eight minutes. Each measurement has its own process group and its own time limit, the most important
ones come first, and a fault of one does not affect the others. Progress goes to standard output, then a table, and
as the last line one JSON object. FOLDER (default: gpu-kit-results) gets the same object in results.json after every
measurement, profiles/ (traces of at most 8 MiB each) and logs/. Options: --help.

Keys of the JSON object. A figure that could not be measured is null, and `errors` has the reason:

- sdxl_lora_1024_share_of_peak, sd15_lora_512_share_of_peak, sdxl_full_1024_share_of_peak: floating-point operations per
  second of training, divided by the dense bf16 peak of the data sheet. Default settings, first batch size. The
  operations are those of bench/gpu_kit/flops.py, with what gradient checkpointing computes twice; without it, the
  share is model_share_of_peak in measurements.
- sdxl_controlnet_512_images_per_second.
- failure_to_first_step_seconds: from SIGKILL of a rank until the first new step of the job.
- pod_loss_to_first_step_seconds: the same for SIGKILL of a rank and its supervisor.
- restart_phases: the parts of both (rank, pod): the time until the rank's program runs, then the states of the rank.
- weights: by killed job, whether its weights equal those of an undisturbed job (bit_identical, largest_difference
  relative to the largest weight of each tensor, within_tolerance).
- checkpoint_stall_ratio: additional time of the steps during a save / duration of accelerate's save_state.
- CASE_speedup: images per second of the product, divided by those of a plain loop with diffusers, accelerate and peft.
- CASE_best, CASE_best_images_per_second: name and speed of the fastest measurement of a case with its first batch
  size. sdxl_lora_1024 is measured with cudaGraphs and compile on and off, two more cases with compile on.
- presets: by memory preset, the chosen settings, estimate_gib and the measured peak_gib.
- device, tiny (figures of tiny models mean nothing), seconds (of the complete run), errors (by measurement).
- measurements: all figures of each measurement by name. Of a training case: seconds_per_step, images_per_second,
  share_of_peak, peak_gib, reserved_gib, build_seconds, first_step_seconds, batch, settings, notes, and in profile:
  top kernels, kernels_per_step, launches_per_step, device_busy_seconds_per_step, device_utilisation.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys
import tempfile
import time
import zipfile
from pathlib import Path

STARTED = time.monotonic()
KIT = Path(__file__).resolve().parent
SOURCES = ("source/operator", "source/trainer", "source")


def numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version, to compare it with another."""
    return tuple(int(number) for number in re.findall(r"\d+", version))


def is_missing(wheel: Path) -> bool:
    """Return whether the machine lacks a package, or has an older release of it."""
    name, version = wheel.name.split("-")[:2]
    try:
        return numbers(importlib.metadata.version(name)) < numbers(version)
    except importlib.metadata.PackageNotFoundError:
        return True


def unpack(target: Path) -> list[str]:
    """Unpack the wheels that the machine lacks, and return their names."""
    unpacked = []
    for wheel in sorted((KIT / "wheels").glob("*.whl")):
        if is_missing(wheel):
            zipfile.ZipFile(wheel).extractall(target)
            unpacked.append(wheel.name.split("-")[0])
    return unpacked


def main() -> int:
    """Make the kit's packages importable for this process and its children, and run the driver."""
    made_for = json.loads((KIT / "kit.json").read_text(encoding="utf-8"))["python"]
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    if running != made_for:
        raise RuntimeError(f"the kit is for Python {made_for}, and this is {running}; use python{made_for}")
    with tempfile.TemporaryDirectory(prefix="gpu-kit-site-") as site:
        print(f"unpacked: {', '.join(unpack(Path(site))) or 'nothing'}", flush=True)
        paths = [*(str(KIT / source) for source in SOURCES), site]
        sys.path[:0] = paths
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        from bench.gpu_kit import driver  # noqa: PLC0415  importable only now

        return driver.main(started=STARTED)


if __name__ == "__main__":
    try:
        CODE = main()
    except Exception as error:
        print(json.dumps({"errors": {"setup": f"{type(error).__name__}: {error}"}}), flush=True)
        CODE = 1
    sys.exit(CODE)
