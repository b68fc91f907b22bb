"""Interface between the training loop and a method: trained parameters, losses of a batch, and export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from finetune_contract.spec import OutputFormat, TrainingSpec
from finetune_trainer.data.batches import Batch, Texts
from finetune_trainer.data.captions import Captions
from finetune_trainer.data.sampling.draws import Draws
from finetune_trainer.models.family import Family


@dataclass(frozen=True)
class MethodContext:
    """Inputs from which a method is created.

    Attributes:
        family: the opened base model.
        training: the manifest's settings.
        draws: keyed random draws, for weights that are initialized randomly.
        device: device of the training.
        dtype: number format of frozen weights and of the forward pass.
    """

    family: Family
    training: TrainingSpec
    draws: Draws
    device: torch.device
    dtype: torch.dtype


class Method(Protocol):
    """A fine-tuning method that is ready to train."""

    def __init__(self, context: MethodContext) -> None: ...

    text: Texts | None
    """Text conditions that the method computes itself, with their graph; None if it uses the cached ones."""

    @staticmethod
    def captions(training: TrainingSpec) -> Captions:
        """Return how the caption of a sample is chosen."""
        ...

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the trained parameters by name, float32, in a fixed order.

        The loop owns their gradients and their optimizer.
        """
        ...

    def sharded_modules(self) -> Sequence[nn.Module]:
        """Return the modules whose parameters can be sharded; empty if the method cannot be sharded."""
        ...

    def set_training(self, training: bool) -> None:
        """Switch dropout and gradient checkpointing, which only training uses, on or off."""
        ...

    def losses(self, batch: Batch) -> Tensor:
        """Return the loss of each sample, float32 (n,), with the graph for the backward pass."""
        ...

    def predict(
        self, noisy: Tensor, timesteps: Tensor, text: Mapping[str, Tensor], conditioning: Tensor | None = None
    ) -> Tensor:
        """Return the model's output for noisy latents, for validation pictures."""
        ...

    def export(self, output_format: OutputFormat, folder: Path) -> list[Path]:
        """Write the trained weights into an empty folder. Equal weights give equal bytes.

        Args:
            output_format: one of the method's formats in `finetune_contract.methods`.
            folder: target folder.

        Returns:
            The files written.
        """
        ...
