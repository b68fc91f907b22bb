"""Text-to-image LoRA (https://arxiv.org/abs/2106.09685): low-rank updates of the UNet's attention projections."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finetune_contract.spec import LoraSpec, OutputFormat
from finetune_trainer.data.batches import Batch
from finetune_trainer.data.draws import Purpose
from finetune_trainer.data.order import SampleRef
from finetune_trainer.errors import ConfigError
from finetune_trainer.methods.loss import diffusion_losses
from finetune_trainer.methods.method import MethodContext
from finetune_trainer.tensor_file import write_tensors

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"


class Lora:
    """LoRA on the UNet; see `Method`."""

    formats: ClassVar = frozenset({OutputFormat.DIFFUSERS})

    def __init__(self, context: MethodContext) -> None:
        self._family = context.family
        self._schedule = context.family.schedule.to(context.device)
        self._snr_gamma = context.training.snr_gamma
        self._device_type = context.device.type
        self._dtype = context.dtype
        self._unet = context.family.load_unet(context.dtype)
        self._unet.requires_grad_(False)
        torch.manual_seed(context.draws.torch_seed(Purpose.INIT, SampleRef(0, 0)))
        _add_adapter(self._unet, context.training.lora or LoraSpec())
        self._parameters = {name: p for name, p in self._unet.named_parameters() if p.requires_grad}
        for parameter in self._parameters.values():
            parameter.data = parameter.data.float()
        self._unet.to(context.device)
        if context.training.gradient_checkpointing:
            self._unet.enable_gradient_checkpointing()
        self.set_training(True)

    def set_training(self, training: bool) -> None:
        """Switch dropout and gradient checkpointing on or off."""
        self._unet.train(training)

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The adapters' matrices."""
        return self._parameters

    def losses(self, batch: Batch) -> Tensor:
        """Loss of each sample, float32 (n,)."""
        return diffusion_losses(batch, self._schedule, self.predict, self._snr_gamma)

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Mapping[str, Tensor]) -> Tensor:
        """The adapted UNet's answer to noisy latents."""
        hidden = {name: value.to(self._dtype) for name, value in text.items()}
        return self._family.predict(self._unet, noisy.to(self._dtype), timesteps, hidden)

    def export(self, output_format: OutputFormat, folder: Path) -> list[Path]:
        """Write pytorch_lora_weights.safetensors as diffusers' load_lora_weights reads it."""
        assert output_format in self.formats
        from peft.utils import get_peft_model_state_dict  # noqa: PLC0415  slow to import

        config = self._unet.peft_config["default"].to_dict()
        state = get_peft_model_state_dict(self._unet)
        path = folder / WEIGHTS_NAME
        # peft holds the target modules as a set, whose order differs from process to process.
        metadata = {f"unet.{key}": sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        write_tensors(
            path,
            {f"unet.{name}": value for name, value in state.items()},
            {"format": "pt", "lora_adapter_metadata": json.dumps(metadata, sort_keys=True, default=str)},
        )
        return [path]


def _add_adapter(unet: Any, spec: LoraSpec) -> None:
    from peft import LoraConfig  # noqa: PLC0415  slow to import

    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha if spec.alpha is not None else spec.rank,
        lora_dropout=spec.dropout,
        init_lora_weights="gaussian",
        target_modules=list(spec.target_modules),
    )
    try:
        unet.add_adapter(config)
    except ValueError as error:
        known = sorted(
            {name.rsplit(".", 1)[-1] for name, module in unet.named_modules() if isinstance(module, nn.Linear)}
        )
        raise ConfigError(
            f"training.lora.targetModules: {', '.join(spec.target_modules)} match no module of the base's UNet; "
            f"its linear modules end with {', '.join(known)}"
        ) from error
