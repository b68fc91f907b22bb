"""Opens a folder in diffusers' layout, e.g. the output of a script, as what it contains: any format follows."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from finetune_contract.input_spec import ModelSpec
from finetune_trainer.errors import ConfigError
from finetune_trainer.export.formats.diffusers_folder import INDEX, LORA_NAME
from finetune_trainer.export.formats.merge import read_adapter
from finetune_trainer.methods.adapter_file import find_adapter_file
from finetune_trainer.methods.embedding_file import find_embedding_files, read_embeddings
from finetune_trainer.models.base import open_base
from finetune_trainer.models.family import Family
from finetune_trainer.models.layouts.folder import read_part
from finetune_trainer.models.layouts.trained import (
    ModelPart,
    Trained,
    TrainedControlNet,
    TrainedEmbedding,
    TrainedPipeline,
)
from finetune_trainer.models.parts import read_config, remove_source_path

_CONTROLNET = "ControlNetModel"
_FIELD = "outputs"


def open_trained(
    folder: Path, base: ModelSpec | None = None, cache_dir: Path | None = None, *, whole: bool = False
) -> Trained:
    """Return what is in a folder: an embedding, a pipeline, a ControlNet, or a LoRA file.

    Next to an embedding, a pipeline is only its base: no single file of it would contain the new word.

    Args:
        folder: the folder.
        base: the base of an embedding, a ControlNet or a LoRA; a pipeline contains it.
        cache_dir: folder for a base that must be converted.
        whole: whether all parts of the base are needed.

    Raises:
        ConfigError: the folder contains none of these, or its base is not known.
    """
    embeddings = sorted(folder.glob("learned_embeds.*"))
    if not embeddings and (folder / INDEX).is_file():
        return TrainedPipeline(open_base(ModelSpec(base=str(folder))), {})
    if base is None:
        raise ConfigError(f"outputs: {folder} is no complete pipeline, and its base is unknown; write model.base")
    family = open_base(base, cache_dir, whole=whole)
    if embeddings:
        return read_embedding(folder, family)
    config = folder / "config.json"
    if config.is_file() and read_config(config).get("_class_name") == _CONTROLNET:
        return TrainedControlNet(family, ModelPart(read_part(folder, None, _FIELD), lambda to: _copy(config, to)))
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"outputs: {folder} contains neither a pipeline nor a ControlNet nor a LoRA nor an embedding; "
            "write format: asWritten"
        )
    return read_adapter(find_adapter_file(folder, LORA_NAME, _FIELD), family, _FIELD)


def read_embedding(folder: Path, family: Family) -> TrainedEmbedding:
    """Return an embedding: one file of diffusers for each text encoder of its base.

    Raises:
        ConfigError: the files are no embedding for this base.
    """
    # Without their weights.
    parts = family.load_text_encoder(torch.device("meta")).parts
    files, vectors = find_embedding_files(folder), dict[str, Tensor]()
    token = ""
    for part, path in zip(parts, files, strict=False):
        found = read_embeddings(path, _FIELD)
        token = token or next(iter(found))
        width = part.core.embeddings.token_embedding.weight.shape[1]
        if list(found) != [token] or found[token].shape[1] != width:
            raise ConfigError(f"outputs: {path} contains no vectors of one word of width {width}, as {part.name} needs")
        vectors[part.name] = found[token]
    if len(vectors) != len(parts):
        raise ConfigError(f"outputs: {folder} contains embeddings for {len(vectors)} of {len(parts)} text encoders")
    return TrainedEmbedding(family, token, vectors, {part.name: part.webui_key for part in parts})


def _copy(config: Path, folder: Path) -> None:
    shutil.copyfile(config, folder / config.name)
    remove_source_path(folder / config.name)
