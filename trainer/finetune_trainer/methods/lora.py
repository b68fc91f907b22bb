"""Text-to-image LoRA (https://arxiv.org/abs/2106.09685): low-rank updates of the denoiser's attention layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from finetune_contract.methods import encodes_text
from finetune_contract.spec import LoraSpec, SwitchMode
from finetune_trainer.errors import ConfigError
from finetune_trainer.fused.mask_draws import DrawnDropout
from finetune_trainer.methods.adapter_bank import use_adapter_bank
from finetune_trainer.methods.adapter_file import load_adapters
from finetune_trainer.methods.denoiser_method import DenoiserMethod
from finetune_trainer.methods.lora_linear import use_fast_linears
from finetune_trainer.methods.method import MethodContext
from finetune_trainer.models.layouts.trained import LowRank, TrainedAdapter
from finetune_trainer.models.text_names import portable_text_name
from finetune_trainer.weights.lazy import in_memory

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
TEXT_MODULES = ("q_proj", "k_proj", "v_proj", "out_proj")
"""Layers of a text encoder that get an adapter."""


class Lora(DenoiserMethod):
    """LoRA on the denoiser, and optionally on the text encoders; see `Method`."""

    def __init__(self, context: MethodContext) -> None:
        super().__init__(context)
        self._spec = context.training.lora or LoraSpec()
        # DoRA computes norms of the frozen weights in every step.
        self._uses_weights = self._spec.use_dora
        _add_adapter(self._denoiser, self._spec)
        self._adapted: dict[str, Any] = {context.family.denoiser_name: self._denoiser}
        if encodes_text(context.training):
            for part in self._load_text(context.dtype).parts:
                part.model.add_adapter(_config(self._spec, TEXT_MODULES))
                self._adapted[part.name] = part.model
                self._modules.append(part.model)
        if self._spec.base is not None:
            load_adapters(Path(self._spec.base), self._spec, self._adapted, context.family)
        self._finish(
            {
                name if module is self._denoiser else f"{prefix}.{name}": parameter
                for prefix, module in self._adapted.items()
                for name, parameter in module.named_parameters()
                if parameter.requires_grad
            }
        )

    def _finish(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Finish as every method, and compute the adapters by fewer operations."""
        for module in self._adapted.values():
            if self._context.training.compile is SwitchMode.ON:
                # The compiler fuses the operations of each layer; it cannot trace the bank's.
                use_fast_linears(module)
        super()._finish(trained)
        if self._context.training.compile is not SwitchMode.ON:
            for module in self._adapted.values():
                use_adapter_bank(module, self._dtype)
                if self._masks is not None:
                    _draw_masks(module)

    @contextlib.contextmanager
    def trained(self) -> Iterator[TrainedAdapter]:
        """Return a block in which the adapters can be written."""
        from peft.utils import get_peft_model_state_dict  # noqa: PLC0415  slow to import

        found: dict[str, dict[str, Tensor]] = {}
        for prefix, module in self._adapted.items():
            is_text = module is not self._denoiser
            for name, value in get_peft_model_state_dict(module).items():
                layer, kind = _split(name)
                key = f"{prefix}.{portable_text_name(layer) if is_text else layer}"
                found.setdefault(key, {})[kind] = value.detach()
        alpha = _alpha(self._spec)
        layers = {
            name: LowRank(
                in_memory(each["lora_A"]), in_memory(each["lora_B"]), alpha, each.get("lora_magnitude_vector")
            )
            for name, each in found.items()
        }
        yield TrainedAdapter(self._family, layers)


def _split(name: str) -> tuple[str, str]:
    """Return the layer and the kind of one of peft's tensors."""
    layer, _, kind = name.removesuffix(".weight").rpartition(".")
    return layer, kind


def _alpha(spec: LoraSpec) -> float:
    return spec.alpha if spec.alpha is not None else spec.rank


def _config(spec: LoraSpec, target_modules: tuple[str, ...]) -> Any:
    from peft import LoraConfig  # noqa: PLC0415  slow to import

    return LoraConfig(
        r=spec.rank,
        lora_alpha=_alpha(spec),
        lora_dropout=spec.dropout,
        init_lora_weights="gaussian",
        use_dora=spec.use_dora,
        target_modules=list(target_modules),
    )


def _draw_masks(module: nn.Module) -> None:
    """Let adapters that the bank does not compute, e.g. of convolutions, draw their masks as it does."""
    from peft.tuners.lora.layer import LoraLayer  # noqa: PLC0415  slow to import

    for layer in module.modules():
        if isinstance(layer, LoraLayer) and isinstance(dropout := layer.lora_dropout["default"], nn.Dropout):
            layer.lora_dropout["default"] = DrawnDropout(dropout.p)


def _add_adapter(denoiser: Any, spec: LoraSpec) -> None:
    try:
        denoiser.add_adapter(_config(spec, spec.target_modules))
    except ValueError as error:
        known = sorted(
            {name.rsplit(".", 1)[-1] for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)}
        )
        raise ConfigError(
            f"training.lora.targetModules: {', '.join(spec.target_modules)} match no layer of the base's "
            f"denoiser; write one or more of {', '.join(known)}"
        ) from error
