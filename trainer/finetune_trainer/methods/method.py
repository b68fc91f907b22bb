"""Interface between the training loop and a method: trained parameters, losses of a batch, and export."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from finetune_contract.spec import TrainingSpec
from finetune_trainer.data.batches import Batch, Texts
from finetune_trainer.data.captions import Captions
from finetune_trainer.data.sampling.draws import Draws
from finetune_trainer.models.direct import EarlyDenoiser
from finetune_trainer.models.family import Family
from finetune_trainer.models.layouts.trained import Trained


@dataclass(frozen=True)
class MethodContext:
    """Inputs from which a method is created.

    Attributes:
        family: the opened base model.
        training: the manifest's settings.
        draws: keyed random draws, for weights that are initialized randomly.
        device: device of the training.
        dtype: number format of frozen weights and of the forward pass.
        early: loads the denoiser before or when it is needed; None: the family loads it.
        uses_ipex: whether IPEX computes linear layers and convolutions, on CPUs.
    """

    family: Family
    training: TrainingSpec
    draws: Draws
    device: torch.device
    dtype: torch.dtype
    early: EarlyDenoiser | None = None
    uses_ipex: bool = False

    def load_denoiser(self, dtype: torch.dtype) -> Any:
        """Return the denoiser in `dtype`: on the device of the training, or on the CPU."""
        found = None if self.early is None else self.early.take()
        return self.family.load_denoiser(dtype) if found is None else found


class Method(Protocol):
    """A fine-tuning method that is ready to train."""

    def __init__(self, context: MethodContext) -> None: ...

    text: Texts | None
    """Text conditions that the method computes itself, with their graph; None if it uses the cached ones."""

    @staticmethod
    def captions(training: TrainingSpec) -> Captions:
        """Return how the caption of a sample is chosen."""
        ...

    @classmethod
    def denoiser_place(cls, dtype: torch.dtype, device: torch.device) -> tuple[torch.dtype, torch.device]:
        """Return the number format and the device of the denoiser that the method starts from."""
        ...

    @classmethod
    def trains_denoiser(cls) -> bool:
        """Return whether the denoiser's own weights are trained."""
        ...

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the trained parameters by name, float32, in a fixed order.

        The loop owns their gradients and their optimizer.
        """
        ...

    def leaves(self) -> Sequence[nn.Parameter]:
        """Return the tensors that the backward pass computes gradients of, one for each trained parameter.

        They are the parameters themselves, or their copies in the number format of the forward pass.
        """
        ...

    def refresh(self) -> None:
        """Update the copies of the trained parameters. Call it after the parameters have changed."""
        ...

    def sharded_modules(self) -> Sequence[nn.Module]:
        """Return the modules whose parameters can be sharded; empty if the method cannot be sharded."""
        ...

    def set_training(self, training: bool) -> None:
        """Switch dropout and gradient checkpointing, which only training uses, on or off."""
        ...

    def prepare(self, batch: Batch) -> Batch:
        """Return the batch with all that the host computes for its losses, e.g. the tokens of its captions."""
        ...

    def use_attention(self, backends: Sequence[SDPBackend]) -> None:
        """Let the denoiser use these attention kernels, in this order."""
        ...

    def modules(self) -> Sequence[nn.Module]:
        """Return the models that compute the losses."""
        ...

    def use_layout(self, layout: torch.memory_format) -> None:
        """Let images, and the weights of convolutions that are not trained themselves, have this layout."""
        ...

    def forward_context(self) -> contextlib.AbstractContextManager[object]:
        """Return the context in which the models compute, which chooses number formats and kernels."""
        ...

    def seed(self, seed: int) -> None:
        """Set the seed of the random numbers of the next pass, e.g. of dropout."""
        ...

    def generators(self) -> Sequence[torch.Generator]:
        """Return the generators of passes besides torch's own. A captured pass must know them."""
        ...

    def losses(self, batch: Batch) -> Tensor:
        """Return the loss of each sample, float32 (n,), with the graph for the backward pass."""
        ...

    def predict(
        self, noisy: Tensor, timesteps: Tensor, text: Mapping[str, Tensor], conditioning: Tensor | None = None
    ) -> Tensor:
        """Return the model's output for noisy latents, for validation pictures."""
        ...

    def trained(self) -> AbstractContextManager[Trained]:
        """Return a block in which the trained weights can be written, in fp32 if the method trains complete parts."""
        ...
