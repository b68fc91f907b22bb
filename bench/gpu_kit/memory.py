"""Peak memory of the memory presets beside their estimates, and of AdamW with 8-bit moments."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from bench.gpu_kit.bases import case_of, gib, make_case_loop, make_training
from bench.gpu_kit.items import Context, NotPossibleError
from bench.gpu_kit.training import time_steps
from finetune_contract.spec import TrainingSpec
from finetune_trainer.train.hardware import count_weights, has_bf16
from finetune_trainer.train.preset import Hardware, choose, estimate_bytes, preset_bytes
from testing.gpu_kit.records import read_records
from testing.gpu_kit.schedule import MAIN_CASE, PRESETS, TrainingCase
from testing.measure.device import measured_device, peak_bytes, synchronize
from testing.measure.launches import MetaFamily

PRESET_STEPS = 2
OPTIMIZER_CASE = TrainingCase("sd15", "Full", 512, 4, 4)


class _CountedFamily(MetaFamily):
    """A base whose files hold the names and sizes of its weights, and no weights: a preset reads nothing else."""

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__(name)
        self._folder = folder

    def denoiser_files(self) -> list[Path]:
        """Return the file of the UNet."""
        sizes = {name: list(weight.shape) for name, weight in self.load_denoiser(torch.bfloat16).named_parameters()}
        header = json.dumps({name: {"shape": shape} for name, shape in sizes.items()}).encode()
        path = self._folder / f"{self.name}-sizes.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        return [path]


def preset(context: Context, preset: str) -> None:
    """Run the main case as a preset chooses its settings for a GPU of its size. Record estimate and peak."""
    case = case_of(context, MAIN_CASE)
    requested = make_training(case, case.batch, {}).model_copy(update={"memory_preset": preset})
    device = measured_device()
    hardware = Hardware(
        memory_bytes=preset_bytes(preset) or 0,
        is_gpu=True,
        has_bf16=has_bf16(device) or context.tiny,
        has_8bit=importlib.util.find_spec("bitsandbytes") is not None,
    )
    weights = count_weights(requested, _CountedFamily(case.family, context.folder))
    choice = choose(requested, hardware, weights)
    chosen = choice.training.model_copy(update={"memory_preset": None})
    settings = {
        "precision": chosen.precision and chosen.precision.value,
        "gradientCheckpointing": chosen.gradient_checkpointing,
        "optimizer": chosen.optimizer.value,
        "batchSize": chosen.batch_size,
        "centerCrop": chosen.center_crop,
    }
    context.record.add(settings=settings, estimate_gib=gib(estimate_bytes(chosen, weights, hardware)))
    if (same := _same_settings(context, preset, settings)) is not None:
        context.record.add(peak_gib=same[1], measured_for=same[0])
        return
    context.record.add(peak_gib=_peak_gib(context, case, chosen))


def _same_settings(context: Context, preset: str, settings: Mapping[str, object]) -> tuple[str, float] | None:
    """Return an earlier preset that chose the same settings, and its peak."""
    for earlier in PRESETS[: PRESETS.index(preset)]:
        values = read_records(context.folder / "records" / f"preset_{earlier}.jsonl").values
        if values.get("settings") == settings and "peak_gib" in values:
            return earlier, values["peak_gib"]
    return None


def _peak_gib(context: Context, case: TrainingCase, training: TrainingSpec) -> float:
    """Return the peak memory of a few steps, with the memory that the driver and the libraries take."""
    loop, _ = make_case_loop(context, case, training)
    for _ in range(PRESET_STEPS):
        loop.train_step()
    synchronize()
    return gib(peak_bytes() + _context_bytes())


def _context_bytes() -> int:
    """Return the GPU memory that is in use outside of torch's allocator; the kit is assumed to be alone."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return max(0, total - free - torch.cuda.memory_reserved())


def adamw8bit(context: Context) -> None:
    """Measure full training of SD 1.5 with 8-bit moments, and with AdamW.

    Raises:
        NotPossibleError: the library is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise NotPossibleError("bitsandbytes is not installed on this machine, and the kit does not contain it")
    case = OPTIMIZER_CASE.tiny() if context.tiny else OPTIMIZER_CASE
    loop, _ = make_case_loop(context, case, make_training(case, case.batch, {"optimizer": "adamw8bit"}))
    seconds = time_steps(loop, 2, 1.0)
    context.record.add(seconds_per_step=seconds, peak_gib=gib(peak_bytes()))
    del loop
    torch.cuda.empty_cache()
    loop, _ = make_case_loop(context, case, make_training(case, case.batch, {}))
    context.record.add(
        adamw_seconds_per_step=time_steps(loop, 2, 1.0),
        adamw_peak_gib=gib(peak_bytes()),
    )
