"""What a method has trained, independent of the format of the output. Methods make it; the exports write it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune_trainer.models.family import Family
from finetune_trainer.models.text_names import portable_text_name
from finetune_trainer.weights.lazy import LazyTensor, in_memory


@dataclass(frozen=True)
class ModelPart:
    """A complete part of a pipeline.

    Attributes:
        tensors: its tensors by the names that diffusers and transformers read.
        write_config: writes its configuration into a folder.
    """

    tensors: Mapping[str, LazyTensor]
    write_config: Callable[[Path], object]


@dataclass(frozen=True)
class TrainedPipeline:
    """A complete pipeline: trained parts, and the others as they are in the base.

    Attributes:
        family: the base.
        parts: the trained parts by the names of their folders.
    """

    family: Family
    parts: Mapping[str, ModelPart]

    def tensors(self, part: str) -> Mapping[str, LazyTensor]:
        """Return the tensors of a part, trained or not."""
        return self.parts[part].tensors if part in self.parts else self.family.pipeline.tensors(part)


@dataclass(frozen=True)
class LowRank:
    """The adapter of one layer: it adds alpha / rank * up @ down to the layer's weight.

    The matrices of a whole LoRA need hundreds of megabytes, so they are read when they are written.

    Attributes:
        down: the matrix A (rank, in, ...).
        up: the matrix B (out, rank, ...).
        alpha: LoRA's alpha.
        magnitude: DoRA's norms of the output channels; None without DoRA.
    """

    down: LazyTensor
    up: LazyTensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Return its rank."""
        return int(self.down.shape[0])

    @property
    def scale(self) -> float:
        """Return alpha / rank."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class TrainedAdapter:
    """A LoRA.

    Attributes:
        family: the base.
        layers: its layers by the names of their modules in diffusers, with the part as the first component.
    """

    family: Family
    layers: Mapping[str, LowRank]


@dataclass(frozen=True)
class TrainedControlNet:
    """A ControlNet."""

    family: Family
    part: ModelPart


@dataclass(frozen=True)
class TrainedEmbedding:
    """Vectors of a new token.

    Attributes:
        family: the base.
        token: the token.
        vectors: the vectors (k, width) by the names of the text encoders.
        keys: names of the vectors in the web UIs' files, by the names of the text encoders.
    """

    family: Family
    token: str
    vectors: Mapping[str, Tensor]
    keys: Mapping[str, str]


Trained = TrainedPipeline | TrainedAdapter | TrainedControlNet | TrainedEmbedding


def part_of_module(module: Any, *, is_text: bool = False) -> ModelPart:
    """Return a part whose weights are in a module; they are read when they are written."""

    def write_config(folder: Path) -> None:
        # Modules of diffusers write their configuration themselves; those of transformers have an object for it.
        (module.save_config if hasattr(module, "save_config") else module.config.save_pretrained)(folder)

    state = {(portable_text_name(name) if is_text else name): value for name, value in module.state_dict().items()}
    return ModelPart({name: in_memory(value) for name, value in state.items()}, write_config)


def converted(part: ModelPart, convert: Callable[[LazyTensor], LazyTensor]) -> ModelPart:
    """Return a part with changed tensors."""
    return dataclasses.replace(part, tensors={name: convert(value) for name, value in part.tensors.items()})
