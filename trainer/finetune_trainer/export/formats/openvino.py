"""Writes a complete model as IR of OpenVINO by optimum-intel, and compares its picture with that of torch.

It needs the packages of the extra `export`. Readers open the folder with optimum-intel's `OVDiffusionPipeline`.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from finetune_contract.outputs.spec import OutputPrecision, OutputSpec, WeightQuantization
from finetune_contract.requirements import find_missing_export
from finetune_trainer.errors import ConfigError
from finetune_trainer.export.formats.about import About
from finetune_trainer.export.formats.diffusers_folder import write_pipeline
from finetune_trainer.models.layouts.trained import TrainedPipeline

_LOG = logging.getLogger(__name__)
COMPARISON = "openvino-comparison.json"
"""File with the result of the comparison."""
MIN_PSNR, MIN_PSNR_INT8 = 30.0, 15.0
"""Smallest peak signal-to-noise ratio of the pictures, in dB. Quantization changes details of a picture."""
MAX_PSNR = 100.0
"""Ratio of equal pictures, in dB. JSON has no infinity."""
_SEED, _STEPS, _MAX_SIDE = 0, 4, 512
_PROMPT = "a photo"
_TORCH = "torch"
"""Temporary folder with the model in diffusers' layout."""
_NO_REDUCTION = {"INFERENCE_PRECISION_HINT": "f32"}
"""Some processors compute in bf16 by default, which would hide the difference of the weights."""

Draw = Callable[[Any], numpy.ndarray]


@dataclass(frozen=True)
class Comparison:
    """One picture by OpenVINO beside the same one by torch.

    Attributes:
        psnr: peak signal-to-noise ratio in dB.
        limit: smallest accepted ratio.
        prompt: the prompt.
        seed: seed of the noise.
        steps: number of sampling steps.
        width: width of the picture in pixels.
        height: its height.
        quantization: format of quantized weights; None without quantization.
    """

    psnr: float
    limit: float
    prompt: str
    seed: int
    steps: int
    width: int
    height: int
    quantization: str | None


def write_openvino(trained: TrainedPipeline, output: OutputSpec, folder: Path, about: About) -> list[Path]:
    """Write the IR of a pipeline, with its comparison.

    Args:
        trained: the pipeline.
        output: the output; its precision is that of the weights, fp32 by default, or fp16.
        folder: an empty local folder.
        about: the origin, for the prompt.

    Raises:
        ConfigError: a package is missing, or the pictures differ too much.
        OSError: a file cannot be read or written.
    """
    for message in find_missing_export((output,)):
        raise ConfigError(f"outputs: {message.partition(': ')[2]}")
    source = folder / _TORCH
    source.mkdir()
    write_pipeline(trained, output.model_copy(update={"precision": OutputPrecision.FP32}), source)
    prompt = output.trigger_phrase or about.trigger_phrase or _PROMPT
    expected = _draw_with_torch(source, prompt)
    _convert(source, output.quantization, folder)
    shutil.rmtree(source)
    if output.precision is OutputPrecision.FP16:
        _halve(folder)
    comparison = _compare(folder, expected, prompt, output.quantization)
    (folder / COMPARISON).write_text(json.dumps(asdict(comparison), indent=2) + "\n", encoding="utf-8")
    _LOG.info("%s", describe(comparison))
    return sorted(path for path in folder.rglob("*") if path.is_file())


def psnr(one: numpy.ndarray, other: numpy.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two pictures with values from 0 to 1, in dB; 0 if one is not finite."""
    error = float(numpy.mean(numpy.square(one.astype(numpy.float64) - other.astype(numpy.float64))))
    if not math.isfinite(error):
        return 0.0
    return MAX_PSNR if error == 0 else min(MAX_PSNR, -10 * math.log10(error))


def check(comparison: Comparison) -> None:
    """Refuse a model whose picture differs too much.

    Raises:
        ConfigError: the ratio is below the limit.
    """
    if comparison.psnr >= comparison.limit:
        return
    remedy = (
        "write precision: fp32 for this output, or format: diffusers"
        if comparison.quantization is None
        else "leave quantization out"
    )
    raise ConfigError(f"outputs: {describe(comparison)}; {remedy}")


def describe(comparison: Comparison) -> str:
    """Return the result as one phrase."""
    return (
        f"the picture of OpenVINO has a PSNR of {comparison.psnr:.1f} dB beside that of torch, at least "
        f"{comparison.limit:g} dB is needed (prompt {comparison.prompt!r}, seed {comparison.seed}, "
        f"{comparison.steps} steps, {comparison.width} x {comparison.height})"
    )


def read_comparison(folder: Path) -> Comparison:
    """Return the comparison that `write_openvino` has stored in a folder."""
    return Comparison(**json.loads((folder / COMPARISON).read_text(encoding="utf-8")))


def _draw_with_torch(source: Path, prompt: str) -> numpy.ndarray:
    """Return the picture of a pipeline in fp32: (height, width, 3), from 0 to 1."""
    from diffusers import DiffusionPipeline  # noqa: PLC0415  slow to import

    pipeline = DiffusionPipeline.from_pretrained(source, torch_dtype=torch.float32, **_without_checker(source))
    side = min(_MAX_SIDE, pipeline.unet.config.sample_size * pipeline.vae_scale_factor)
    picture = _draw(pipeline, prompt, side, side)
    del pipeline
    gc.collect()
    return picture


def _draw(pipeline: Any, prompt: str, width: int, height: int) -> numpy.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(_SEED)
    size = {"width": width, "height": height}
    drawn = pipeline(prompt, num_inference_steps=_STEPS, generator=generator, output_type="np", **size)
    picture: numpy.ndarray = drawn.images[0]
    return picture


def _without_checker(folder: Path) -> dict[str, None]:
    """Return the argument that leaves out a safety checker, which would replace pictures by black ones."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    return {"safety_checker": None} if "safety_checker" in index else {}


def _convert(source: Path, quantization: WeightQuantization | None, folder: Path) -> None:
    """Convert a pipeline. Without an explicit value, optimum-intel quantizes large models to int8."""
    optimum = importlib.import_module("optimum.intel")
    is_int8 = quantization is WeightQuantization.INT8
    pipeline = optimum.OVDiffusionPipeline.from_pretrained(
        str(source), export=True, compile=False, load_in_8bit=is_int8, local_files_only=True
    )
    pipeline.save_pretrained(folder)
    del pipeline
    gc.collect()


def _halve(folder: Path) -> None:
    """Store the weights of all models in fp16. optimum-intel would leave those of convolutions in fp32."""
    openvino = importlib.import_module("openvino")
    for path in sorted(folder.rglob("*.xml")):
        model, target = openvino.Core().read_model(path), path.with_name("half.xml")
        openvino.save_model(model, target, compress_to_fp16=True)
        del model
        gc.collect()
        for suffix in (".bin", ".xml"):
            target.with_suffix(suffix).replace(path.with_suffix(suffix))


def _compare(folder: Path, expected: numpy.ndarray, prompt: str, quantization: WeightQuantization | None) -> Comparison:
    optimum = importlib.import_module("optimum.intel")
    pipeline = optimum.OVDiffusionPipeline.from_pretrained(
        str(folder), export=False, ov_config=_NO_REDUCTION, local_files_only=True, **_without_checker(folder)
    )
    height, width, _ = expected.shape
    found = psnr(_draw(pipeline, prompt, width, height), expected)
    limit = MIN_PSNR if quantization is None else MIN_PSNR_INT8
    name = None if quantization is None else quantization.value
    comparison = Comparison(round(found, 2), limit, prompt, _SEED, _STEPS, width, height, name)
    check(comparison)
    return comparison
