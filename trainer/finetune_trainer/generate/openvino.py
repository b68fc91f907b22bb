"""Opens pipelines for OpenVINO. optimum-intel, which reads them, is a package of the extra `export`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from finetune_contract.outputs.generation import DrawingDevice
from finetune_trainer.errors import ConfigError
from finetune_trainer.export.formats.diffusers_folder import INDEX
from finetune_trainer.models.base import read_json

_DEVICES = {DrawingDevice.AUTO: "CPU", DrawingDevice.CPU: "CPU", DrawingDevice.GPU: "GPU"}


def load(folder: Path, device: DrawingDevice) -> tuple[Any, str]:
    """Return a pipeline and its device in words.

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
        pipeline = kind.from_pretrained(str(folder), export=False, device=name, local_files_only=True, **checker)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"--model: OpenVINO cannot read {folder} on its device {name}: {' '.join(str(error).split())[:200]}; write "
            "a complete folder of format openvino, or --device cpu"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, f"OpenVINO {name}"
