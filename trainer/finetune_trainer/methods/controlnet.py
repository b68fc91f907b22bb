"""ControlNet (https://arxiv.org/abs/2302.05543): a trained copy of the encoder reads conditioning images."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finetune_contract.spec import ControlNetSpec
from finetune_trainer.errors import ConfigError
from finetune_trainer.methods.denoiser_method import DenoiserMethod
from finetune_trainer.methods.method import MethodContext
from finetune_trainer.models.base import find_part
from finetune_trainer.models.layouts.trained import TrainedControlNet, part_of_module

_CLASS = "ControlNetModel"


def check_controlnet(folder: Path) -> None:
    """Refuse a folder that is no ControlNet with safe weights. Reads only its configuration.

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
