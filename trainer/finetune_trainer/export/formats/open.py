"""Opens a folder in diffusers' layout, e.g. the output of a script, as what it contains: any format follows."""

from __future__ import annotations

import shutil
from pathlib import Path

from finetune_contract.input_spec import ModelSpec
from finetune_trainer.errors import ConfigError
from finetune_trainer.export.formats.diffusers_folder import INDEX, LORA_NAME
from finetune_trainer.export.formats.merge import read_adapter
from finetune_trainer.methods.adapter_file import find_adapter_file
from finetune_trainer.models.base import open_base
from finetune_trainer.models.layouts.folder import read_part
from finetune_trainer.models.layouts.trained import ModelPart, Trained, TrainedControlNet, TrainedPipeline
from finetune_trainer.models.parts import read_config, remove_source_path

_CONTROLNET = "ControlNetModel"


def open_trained(folder: Path, base: ModelSpec | None = None, cache_dir: Path | None = None) -> Trained:
    """Return what is in a folder: a pipeline, a ControlNet, or a LoRA file.

    Args:
        folder: the folder.
        base: the base of a ControlNet or a LoRA; a pipeline contains it.
        cache_dir: folder for a base that must be converted.

    Raises:
        ConfigError: the folder contains none of these, or its base is not known.
    """
    if (folder / INDEX).is_file():
        return TrainedPipeline(open_base(ModelSpec(base=str(folder))), {})
    if base is None:
        raise ConfigError(f"outputs: {folder} is no complete pipeline, and its base is unknown; write model.base")
    family = open_base(base, cache_dir)
    config = folder / "config.json"
    if config.is_file() and read_config(config).get("_class_name") == _CONTROLNET:
        return TrainedControlNet(family, ModelPart(read_part(folder, None, "outputs"), lambda to: _copy(config, to)))
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"outputs: {folder} contains neither a pipeline nor a ControlNet nor a LoRA; write format: asWritten"
        )
    return read_adapter(find_adapter_file(folder, LORA_NAME), family, "outputs")


def _copy(config: Path, folder: Path) -> None:
    shutil.copyfile(config, folder / config.name)
    remove_source_path(folder / config.name)
