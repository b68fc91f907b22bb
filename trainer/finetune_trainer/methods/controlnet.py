"""ControlNet (https://arxiv.org/abs/2302.05543): a trained copy of the UNet's encoder reads a conditioning image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finetune_contract.spec import ControlNetSpec, OutputFormat
from finetune_trainer.errors import ConfigError
from finetune_trainer.methods.method import MethodContext
from finetune_trainer.methods.unet_method import UNetMethod
from finetune_trainer.models.base import find_folder


class ControlNet(UNetMethod):
    """All weights of the ControlNet; the UNet is frozen. See `Method`."""

    formats: ClassVar = frozenset({OutputFormat.DIFFUSERS})
    needs_conditioning: ClassVar = True
    _copies_unet: ClassVar = True

    def __init__(self, context: MethodContext) -> None:
        super().__init__(context)
        spec = context.training.controlnet or ControlNetSpec()
        self._is_mixed = True
        self._controlnet = _load(spec, self._unet, context.family.latent_shape[1]).requires_grad_(True)
        self._unet.to(context.dtype)
        self._controlnet.to(device=context.device, dtype=torch.float32)
        if context.training.gradient_checkpointing:
            self._controlnet.enable_gradient_checkpointing()
        self._modules.append(self._controlnet)
        self._finish(dict(self._controlnet.named_parameters()))

    def _answer(
        self, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Any], conditioning: Tensor | None
    ) -> Tensor:
        assert conditioning is not None
        down, middle = self._controlnet(
            noisy, timesteps, controlnet_cond=self._to_input(conditioning), return_dict=False, **conditions
        )
        answer: Tensor = self._unet(
            noisy,
            timesteps,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
            **conditions,
        )[0]
        return answer

    def sharded_modules(self) -> Sequence[nn.Module]:
        """The ControlNet; the frozen UNet stays whole on every rank."""
        return [self._controlnet]

    def export(self, output_format: OutputFormat, folder: Path) -> list[Path]:
        """Write the ControlNet's folder as diffusers' from_pretrained reads it, fp32."""
        assert output_format in self.formats
        self._controlnet.register_to_config(_name_or_path="")
        self._controlnet.save_pretrained(folder)
        return [path for path in folder.iterdir() if path.is_file()]


def _load(spec: ControlNetSpec, unet: Any, factor: int) -> Any:
    """The ControlNet to begin with.

    Raises:
        ConfigError: it cannot be read.
    """
    from diffusers import ControlNetModel  # noqa: PLC0415  slow to import

    if spec.base is None:
        return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=_embedding_channels(factor))
    folder = find_folder(spec.base, None, "training.controlnet.base")
    try:
        return ControlNetModel.from_pretrained(folder, torch_dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        summary = " ".join(str(error).split())[:300]
        raise ConfigError(f"training.controlnet.base: {folder} cannot be read: {summary}") from error


def _embedding_channels(factor: int) -> tuple[int, ...]:
    """Channels of the condition's own encoder: one level more than times it halves the image, 16 to 256."""
    channels = (16, 32, 96, 256)
    levels = factor.bit_length()
    return channels[:levels] if levels <= len(channels) else channels + (channels[-1],) * (levels - len(channels))
