"""ControlNet (https://arxiv.org/abs/2302.05543): a trained copy of the encoder reads conditioning images."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finetune_contract.spec import ControlNetSpec
from finetune_trainer.errors import ConfigError
from finetune_trainer.methods.denoiser_method import DenoiserMethod
from finetune_trainer.methods.method import MethodContext
from finetune_trainer.models.base import find_part
from finetune_trainer.models.family import Family
from finetune_trainer.models.layouts.trained import TrainedControlNet, part_of_module

_CLASS = "ControlNetModel"
_SHARED = {
    "cross_attention_dim": "text embeddings of width",
    "block_out_channels": "blocks with the channels",
    "layers_per_block": "layers per block:",
    "in_channels": "latents with the channels",
}
"""Fields that a ControlNet and its base share, with their meaning."""
_DEFAULT_CHANNELS = (16, 32, 96, 256)
"""Channels of the layers that read conditioning images, if a configuration does not say: they reduce them by 8."""


def find_mismatch(config: Mapping[str, Any], denoiser: Mapping[str, Any], pixels_per_latent: int) -> str:
    """Return why a ControlNet does not fit a base; empty if it does. Pure.

    Args:
        config: configuration of the ControlNet.
        denoiser: that of the base's UNet.
        pixels_per_latent: pixels of an image per latent of the base, along one side.
    """
    for name, what in _SHARED.items():
        own, needed = _one(config.get(name)), _one(denoiser.get(name))
        if own is not None and needed is not None and own != needed:
            return f"has {what} {_shown(own)}, and the base has {_shown(needed)} ({name})"
    channels = config.get("conditioning_channels", 3)
    if channels != 3:
        return f"reads conditioning images with {channels} channels, and those of a data set have 3"
    factor = 2 ** (len(config.get("conditioning_embedding_out_channels", _DEFAULT_CHANNELS)) - 1)
    if factor != pixels_per_latent:
        return (
            f"reduces conditioning images by {factor}, and the base needs {pixels_per_latent} "
            "(conditioning_embedding_out_channels)"
        )
    return ""


def _one(value: Any) -> Any:
    """Return a value that a configuration may repeat for each block."""
    if isinstance(value, list | tuple):
        return value[0] if len(set(value)) == 1 else tuple(value)
    return value


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def check_controlnet(folder: Path, family: Family) -> None:
    """Refuse a folder that is no ControlNet for a base, with safe weights. Reads only configurations.

    Raises:
        ConfigError: the message names the problem.
    """
    advice = "write the folder or hub id of a ControlNet with .safetensors weights, or leave it out"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"training.controlnet.base: {folder}/config.json cannot be read: {error}; {advice}"
        ) from error
    found = config.get("_class_name") if isinstance(config, dict) else None
    if found != _CLASS:
        raise ConfigError(f"training.controlnet.base: {folder} is a {found}, not a {_CLASS}; {advice}")
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"training.controlnet.base: {folder} has no .safetensors weights; {advice}")
    denoiser = family.pipeline.config(family.denoiser_name)
    if problem := find_mismatch(config, denoiser, family.pixels_per_latent):
        raise ConfigError(
            f"training.controlnet.base: {folder} {problem}; write a ControlNet of the same kind of base, or leave it "
            "out"
        )


class ControlNet(DenoiserMethod):
    """All weights of the ControlNet; the denoiser is frozen. See `Method`."""

    _copies_denoiser: ClassVar = True

    def __init__(self, context: MethodContext) -> None:
        super().__init__(context)
        spec = context.training.controlnet or ControlNetSpec()
        self._is_mixed = True
        self._controlnet = self._load(spec).requires_grad_(True)
        self._denoiser.to(context.dtype)
        self._controlnet.to(device=context.device, dtype=torch.float32)
        if context.training.gradient_checkpointing:
            self._checkpoint_activations(self._controlnet)
        self._modules.append(self._controlnet)
        self._finish(dict(self._controlnet.named_parameters()))

    def sharded_modules(self) -> Sequence[nn.Module]:
        """Return the ControlNet. The frozen denoiser is not sharded."""
        return [self._controlnet]

    @contextlib.contextmanager
    def trained(self) -> Iterator[TrainedControlNet]:
        """Return a block in which the ControlNet can be written, fp32."""
        self._controlnet.register_to_config(_name_or_path="")
        with self._fp32_weights():
            yield TrainedControlNet(self._family, part_of_module(self._controlnet))

    def _predict(
        self, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Any], conditioning: Tensor | None
    ) -> Tensor:
        assert conditioning is not None
        images = self._to_input(conditioning)
        control = self._family.control(self._controlnet, noisy, timesteps, images, conditions)
        return self._family.predict(self._denoiser, noisy, timesteps, {**conditions, **control})

    def _load(self, spec: ControlNetSpec) -> Any:
        """Return the ControlNet to start from.

        Raises:
            ConfigError: it cannot be read.
        """
        if spec.base is None:
            return self._family.load_controlnet(self._denoiser, None)
        folder = find_part(spec.base, None, "training.controlnet.base")
        try:
            return self._family.load_controlnet(self._denoiser, folder)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            summary = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"training.controlnet.base: {folder} cannot be read: {summary}; write the folder or hub id of a "
                "ControlNet with .safetensors weights, or leave it out"
            ) from error
