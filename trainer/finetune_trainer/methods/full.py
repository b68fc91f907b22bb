"""Text-to-image fine-tuning of all of the UNet's weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from finetune_contract.spec import OutputFormat
from finetune_trainer.methods.method import MethodContext
from finetune_trainer.methods.unet_method import UNetMethod


class Full(UNetMethod):
    """All weights of the UNet, and of the text encoders where asked; see `Method`."""

    formats: ClassVar = frozenset({OutputFormat.DIFFUSERS})
    _trains_unet: ClassVar = True

    def __init__(self, context: MethodContext) -> None:
        super().__init__(context)
        self._is_mixed = True
        self._trained = {"unet": self._unet}
        if self.encodes_text(context.training):
            for part in self._load_text(torch.float32).parts:
                part.model.requires_grad_(True)
                self._trained[part.name] = part.model
                self._modules.append(part.model)
                if context.training.gradient_checkpointing:
                    part.model.gradient_checkpointing_enable({"use_reentrant": False})
        self._finish(
            {
                f"{name}.{key}": parameter
                for name, module in self._trained.items()
                for key, parameter in module.named_parameters()
                if parameter.requires_grad
            }
        )

    def sharded_modules(self) -> Sequence[nn.Module]:
        """All that is trained."""
        return list(self._trained.values())

    def export(self, output_format: OutputFormat, folder: Path) -> list[Path]:
        """Write the whole pipeline as a folder in diffusers' layout, fp32."""
        assert output_format in self.formats
        return self._family.write_pipeline(folder, self._trained)
