"""Text-to-image fine-tuning of all weights of the denoiser."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import nn

from finetune_contract.methods import encodes_text
from finetune_trainer.methods.denoiser_method import DenoiserMethod
from finetune_trainer.methods.method import MethodContext
from finetune_trainer.models.layouts.trained import TrainedPipeline, part_of_module


class Full(DenoiserMethod):
    """All weights of the denoiser, and optionally of the text encoders; see `Method`."""

    _trains_denoiser: ClassVar = True

    def __init__(self, context: MethodContext) -> None:
        super().__init__(context)
        self._is_mixed = True
        self._trained = {context.family.denoiser_name: self._denoiser}
        if encodes_text(context.training):
            for part in self._load_text(torch.float32).parts:
                part.model.requires_grad_(True)
                self._trained[part.name] = part.model
                self._modules.append(part.model)
                if context.training.gradient_checkpointing:
                    self._checkpoint_activations(part.model)
        self._finish(
            {
                f"{name}.{key}": parameter
                for name, module in self._trained.items()
                for key, parameter in module.named_parameters()
                if parameter.requires_grad
            }
        )

    def sharded_modules(self) -> Sequence[nn.Module]:
        """Return all trained modules."""
        return list(self._trained.values())

    @contextlib.contextmanager
    def trained(self) -> Iterator[TrainedPipeline]:
        """Return a block in which the complete pipeline can be written, fp32."""
        with self._fp32_weights():
            parts = {
                name: part_of_module(module, is_text=self._family.pipeline.is_text(name))
                for name, module in self._trained.items()
            }
            yield TrainedPipeline(self._family, parts)
