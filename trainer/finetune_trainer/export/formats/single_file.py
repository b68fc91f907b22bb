"""Writes what a method trained as one file with the names of Stable Diffusion's original code."""

from __future__ import annotations

from pathlib import Path

from finetune_contract.outputs.spec import OutputSpec
from finetune_trainer.errors import ConfigError
from finetune_trainer.export.formats.about import About
from finetune_trainer.export.formats.files import convert, write_model_file
from finetune_trainer.export.formats.metadata import model_spec
from finetune_trainer.models.layouts.original import CONTROL, controlnet_to_original, markers
from finetune_trainer.models.layouts.trained import TrainedControlNet, TrainedEmbedding, TrainedPipeline
from finetune_trainer.weights.lazy import LazyTensor, in_memory


def write_model(trained: TrainedPipeline, output: OutputSpec, folder: Path, about: About) -> list[Path]:
    """Write a complete model: the denoiser, the VAE and the text encoders.

    Raises:
        ConfigError: the base has tensors that single files have no names for.
    """
    tensors = convert(model_tensors(trained), output)
    metadata = model_spec(trained.family, output, about, is_original=True)
    return [write_model_file(folder, about.name, tensors, output, metadata)]


def model_tensors(trained: TrainedPipeline) -> dict[str, LazyTensor]:
    """Return the tensors of a complete model by their original names."""
    family = trained.family
    try:
        tensors = family.to_original(trained.tensors)
    except KeyError as error:
        raise ConfigError(
            f"model.base: {family.pipeline.folder} has or lacks the tensor {error}, so it cannot be a single file; "
            "write format: diffusers"
        ) from error
    if family.kohya_base_version == "sd_v2":
        # Programs recognize the objective of SD 2.x by its weights.
        return tensors
    return tensors | (markers(zero_snr=family.pipeline.has_zero_snr) if family.pipeline.predicts_v else {})


def write_controlnet(trained: TrainedControlNet, output: OutputSpec, folder: Path, about: About) -> list[Path]:
    """Write a ControlNet."""
    renamed = controlnet_to_original(trained.part.tensors)
    tensors = convert({CONTROL + name: value for name, value in renamed.items()}, output)
    metadata = model_spec(trained.family, output, about, kind="controlnet", is_original=True)
    return [write_model_file(folder, about.name, tensors, output, metadata)]


def write_embedding(trained: TrainedEmbedding, output: OutputSpec, folder: Path, about: About) -> list[Path]:
    """Write the vectors of a token. The web UIs and ComfyUI use the name of the file as the word in prompts."""
    vectors = {trained.keys[part]: in_memory(value) for part, value in trained.vectors.items()}
    metadata = model_spec(trained.family, output, about, kind="textual-inversion", is_original=True)
    return [write_model_file(folder, about.name, convert(vectors, output), output, metadata)]
