"""Writes what a method trained in any format: the one entry for outputs, whatever made the weights.

It writes files into a local folder. Delivery to the target, retries and checksums are the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from finetune_contract.methods import TrainedPart
from finetune_contract.outputs.spec import MergedAdapter, OutputFormat, OutputLayout, OutputSpec
from finetune_trainer.errors import ConfigError
from finetune_trainer.export.formats import diffusers_folder, single_file
from finetune_trainer.export.formats.about import About
from finetune_trainer.export.formats.card import write_card
from finetune_trainer.export.formats.compiled import write_compiled
from finetune_trainer.export.formats.kohya import write_kohya
from finetune_trainer.export.formats.merge import Weighted, merge, read_adapter
from finetune_trainer.export.formats.openvino import write_openvino
from finetune_trainer.export.formats.rank import with_rank
from finetune_trainer.methods.adapter_file import find_adapter_file
from finetune_trainer.models.base import find_folder
from finetune_trainer.models.family import Family
from finetune_trainer.models.hub import ANY_WEIGHTS
from finetune_trainer.models.layouts.trained import (
    Trained,
    TrainedAdapter,
    TrainedControlNet,
    TrainedEmbedding,
    TrainedPipeline,
)

_PROGRAMS = (OutputFormat.WEBUI, OutputFormat.COMFYUI)
_ONE_FILE = (OutputFormat.SINGLE_FILE, *_PROGRAMS)
_CONVERTED: dict[OutputFormat, Callable[[TrainedPipeline, OutputSpec, Path, About], list[Path]]] = {
    OutputFormat.OPENVINO: write_openvino,
    OutputFormat.COMPILED: write_compiled,
}
"""Writers of complete models for one kind of machine."""
_OF_LORA = (OutputFormat.MERGED, *_CONVERTED)
"""Formats that add a LoRA to its base."""
_FOLDERS = (OutputFormat.DIFFUSERS, *_OF_LORA)
_PARTS: dict[type, TrainedPart] = {
    TrainedPipeline: TrainedPart.BASE,
    TrainedAdapter: TrainedPart.ADAPTER,
    TrainedControlNet: TrainedPart.CONTROLNET,
    TrainedEmbedding: TrainedPart.TOKENS,
}


def check_adapters(outputs: Iterable[OutputSpec], family: Family) -> None:
    """Refuse further LoRAs of outputs that do not fit the base, before the training. Only headers are read.

    Raises:
        ConfigError: a LoRA cannot be read, or is for another kind of base.
    """
    for output in outputs:
        if output.adapters:
            merge(_further(family, output.adapters))


def write_format(trained: Trained, output: OutputSpec, folder: Path, about: About) -> list[Path]:
    """Write the files of an output. Equal weights and settings give equal bytes, except for the format compiled.

    Args:
        trained: what a method trained, or `open_trained` found in a folder.
        output: the format and its settings; `to` is not used.
        folder: an empty local folder.
        about: the origin, for names, metadata and the model card.

    Returns:
        The files written.

    Raises:
        ConfigError: the format or a setting does not fit what was trained.
        OSError: a file cannot be read or written.
    """
    writers: dict[type, Callable[..., list[Path]]] = {
        TrainedPipeline: _write_pipeline,
        TrainedAdapter: _write_adapter,
        TrainedControlNet: _write_controlnet,
        TrainedEmbedding: _write_embedding,
    }
    files = writers[type(trained)](trained, output, folder, about)
    if output.format in _FOLDERS and output.layout is not OutputLayout.SINGLE_FILE:
        is_merged = output.format in _OF_LORA
        part = TrainedPart.BASE if is_merged else _PARTS[type(trained)]
        files += write_card(trained.family, output, folder, about, part)
    return files


def _write_pipeline(trained: TrainedPipeline, output: OutputSpec, folder: Path, about: About) -> list[Path]:
    if output.format is OutputFormat.DIFFUSERS:
        return diffusers_folder.write_pipeline(trained, output, folder)
    if output.format in _ONE_FILE:
        return single_file.write_model(trained, output, folder, about)
    if output.format in _CONVERTED and output.strength == 1.0 and not output.adapters:
        return _CONVERTED[output.format](trained, output, folder, about)
    if output.format in _CONVERTED:
        raise ConfigError(
            "outputs: strength and adapters are for a LoRA, and this is a complete pipeline; leave them out"
        )
    raise _other_format(output, "a complete pipeline", "diffusers, single-file, openvino or compiled")


def _write_adapter(trained: TrainedAdapter, output: OutputSpec, folder: Path, about: About) -> list[Path]:
    trained = with_rank(trained, output.rank)
    if output.format is OutputFormat.DIFFUSERS:
        return diffusers_folder.write_adapter(trained, output, folder)
    if output.format in (OutputFormat.KOHYA, *_PROGRAMS):
        return write_kohya(trained, output, folder, about)
    if output.format in _OF_LORA:
        merged = merge([Weighted(trained, output.strength), *_further(trained.family, output.adapters)])
        if output.layout is OutputLayout.SINGLE_FILE:
            return single_file.write_model(merged, output, folder, about)
        if output.format in _CONVERTED:
            return _CONVERTED[output.format](merged, output, folder, about)
        return diffusers_folder.write_pipeline(merged, output, folder)
    raise _other_format(output, "a LoRA", "diffusers, kohya, merged, openvino or compiled")


def _write_controlnet(trained: TrainedControlNet, output: OutputSpec, folder: Path, about: About) -> list[Path]:
    if output.format is OutputFormat.DIFFUSERS:
        return diffusers_folder.write_controlnet(trained, output, folder)
    if output.format in _ONE_FILE:
        return single_file.write_controlnet(trained, output, folder, about)
    raise _other_format(output, "a ControlNet", "diffusers or single-file")


def _write_embedding(trained: TrainedEmbedding, output: OutputSpec, folder: Path, about: About) -> list[Path]:
    if output.format is OutputFormat.DIFFUSERS:
        return diffusers_folder.write_embedding(trained, output, folder)
    if output.format in _ONE_FILE:
        return single_file.write_embedding(trained, output, folder, about)
    raise _other_format(output, "an embedding", "diffusers or single-file")


def _further(family: Family, adapters: tuple[MergedAdapter, ...]) -> list[Weighted]:
    """Return the further LoRAs of a merge."""
    found = []
    for number, each in enumerate(adapters):
        field = f"outputs.adapters[{number}].source"
        path = Path(each.source)
        folder = path if path.is_file() else find_folder(each.source, None, field, ANY_WEIGHTS)
        file = find_adapter_file(folder, diffusers_folder.LORA_NAME)
        found.append(Weighted(read_adapter(file, family, field), each.weight))
    return found


def _other_format(output: OutputSpec, what: str, known: str) -> ConfigError:
    return ConfigError(f"outputs: {what} cannot be written as {output.format.value}; write format: {known}")
