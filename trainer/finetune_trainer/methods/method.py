"""What the loop asks of a method: what is trained, what a batch's losses are, and how the result is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from finetune_contract.spec import OutputFormat, TrainingSpec
from finetune_trainer.data.batches import Batch, Texts
from finetune_trainer.data.captions import Captions
from finetune_trainer.data.sampling.draws import Draws
from finetune_trainer.models.family import Family


@dataclass(frozen=True)
class MethodContext:
    """What a method is made from.

    Attributes:
        family: the opened base model.
        training: the manifest's settings.
        draws: keyed draws, for weights that begin at random.
        device: where to compute.
        dtype: number format of frozen weights and of the forward pass.
    """

    family: Family
    training: TrainingSpec
    draws: Draws
    device: torch.device
    dtype: torch.dtype


class Method(Protocol):
    """A fine-tuning method, made and ready to train."""

    def __init__(self, context: MethodContext) -> None: ...

    formats: ClassVar[frozenset[OutputFormat]]
    """Formats that `export` knows."""
    needs_captions: ClassVar[bool]
    """Whether the data set must have captions."""
    needs_conditioning: ClassVar[bool]
    """Whether batches bring conditioning images."""
    text: Texts | None
    """Embeddings that the method computes itself, with their graph; None where those of the cache serve."""

    @staticmethod
    def captions(training: TrainingSpec) -> Captions:
        """How samples are captioned."""
        ...

    @staticmethod
    def encodes_text(training: TrainingSpec) -> bool:
        """Whether `text` will be there: text encoders are trained, so nothing of them can be cached."""
        ...

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What is trained, by name, in a fixed order; float32. The loop owns their gradients and their optimizer."""
        ...

    def sharded_modules(self) -> Sequence[nn.Module]:
        """Modules whose parameters may be cut into slices; none where a method is trained whole on every rank."""
        ...

    def set_training(self, training: bool) -> None:
        """Switch what only training does (dropout, gradient checkpointing) on or off."""
        ...

    def losses(self, batch: Batch) -> Tensor:
        """Loss of each sample, float32 (n,), with the graph for backward."""
        ...

    def predict(
        self, noisy: Tensor, timesteps: Tensor, text: Mapping[str, Tensor], conditioning: Tensor | None = None
    ) -> Tensor:
        """The model's answer to noisy latents, for validation pictures."""
        ...

    def export(self, output_format: OutputFormat, folder: Path) -> list[Path]:
        """Write the trained weights into an empty folder in one of `formats`; the same weights give the same bytes.

        Returns:
            The files written.
        """
        ...
