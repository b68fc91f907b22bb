"""Opens pipelines for OpenVINO. optimum-intel, which reads them, is a package of the extra `export`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from finetune_contract.outputs.generation import DrawingDevice
from finetune_contract.outputs.spec import OutputPrecision
from finetune_trainer.errors import ConfigError
from finetune_trainer.export.formats.diffusers_folder import INDEX
from finetune_trainer.models.base import read_json

_HINT = "INFERENCE_PRECISION_HINT"
_HINTS = {OutputPrecision.FP32: "f32", OutputPrecision.BF16: "bf16", OutputPrecision.FP16: "f16"}
_DEVICES = {DrawingDevice.AUTO: "CPU", DrawingDevice.CPU: "CPU", DrawingDevice.GPU: "GPU"}


def precision_hint(device: DrawingDevice, precision: OutputPrecision | None) -> dict[str, str]:
    """Return the property of OpenVINO for the number format of the computation. Pure.

    By default, OpenVINO computes in bf16 on some processors, and its pictures then differ from those of the base.
    """
    if precision is None:
        return {} if device is DrawingDevice.GPU else {_HINT: _HINTS[OutputPrecision.FP32]}
    return {_HINT: _HINTS[precision]}


def load(folder: Path, device: DrawingDevice, precision: OutputPrecision | None) -> tuple[Any, str]:
    """Return a pipeline and its device in words.

    Args:
        folder: the folder.
        device: where to draw.
        precision: number format of the computation; None: fp32 on CPUs, and OpenVINO's choice on GPUs.

    Raises:
        ConfigError: optimum-intel is not installed, or cannot read the folder.
    """
    try:
        kind = importlib.import_module("optimum.intel").OVDiffusionPipeline
    except ImportError as error:
        raise ConfigError(
            f"--model: {folder} is a pipeline for OpenVINO, and optimum-intel, which reads it, is not installed; "
            "install it with: pip install 'finetune-operator[export]'"
        ) from error
    name = _DEVICES[device]
    try:
        checker = {"safety_checker": None} if "safety_checker" in read_json(folder / INDEX) else {}
        pipeline = kind.from_pretrained(
            str(folder),
            export=False,
            device=name,
            local_files_only=True,
            ov_config=precision_hint(device, precision),
            **checker,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"--model: OpenVINO cannot read {folder} on its device {name}: {' '.join(str(error).split())[:200]}; write "
            "a complete folder of format openvino, or --device cpu"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, f"OpenVINO {name}"
