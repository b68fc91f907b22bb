"""Text-to-image LoRA (https://arxiv.org/abs/2106.09685): low-rank updates of the denoiser's attention layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from finetune_contract.methods import encodes_text
from finetune_contract.spec import LoraSpec, OutputFormat, SwitchMode
from finetune_trainer.errors import ConfigError
from finetune_trainer.methods.adapter_bank import use_adapter_bank
from finetune_trainer.methods.adapter_file import load_adapters
from finetune_trainer.methods.denoiser_method import DenoiserMethod
from finetune_trainer.methods.kohya import kohya_metadata, to_kohya
from finetune_trainer.methods.lora_linear import use_fast_linears
from finetune_trainer.methods.mask_draws import DrawnDropout
from finetune_trainer.methods.method import MethodContext
from finetune_trainer.models.text_names import portable_text_name
from finetune_trainer.tensor_file import write_tensors

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

    def export(self, output_format: OutputFormat, folder: Path) -> list[Path]:
        """Write one file, for diffusers' load_lora_weights or with the names of kohya's scripts and the web UIs."""
        rank, alpha = self._spec.rank, _alpha(self._spec)
        if output_format is OutputFormat.DIFFUSERS:
            path = folder / WEIGHTS_NAME
            write_tensors(path, scaled_to_rank(self._state(), alpha / rank), {"format": "pt"})
            return [path]
        assert output_format in (OutputFormat.KOHYA, OutputFormat.WEBUI)
        path = folder / "lora.safetensors"
        metadata = kohya_metadata(self._family.kohya_base_version, rank, alpha)
        write_tensors(path, to_kohya(self._state(), alpha, self._family.kohya_name), metadata)
        return [path]

    def _state(self) -> dict[str, Tensor]:
        """Return all adapters by diffusers' names."""
        from peft.utils import get_peft_model_state_dict  # noqa: PLC0415  slow to import

        state: dict[str, Tensor] = {}
        for prefix, module in self._adapted.items():
            is_text = module is not self._denoiser
            for name, value in get_peft_model_state_dict(module).items():
                # diffusers' loader of text encoders expects the suffix that peft omits.
                suffix = ".weight" if is_text and name.endswith(".lora_magnitude_vector") else ""
                state[f"{prefix}.{portable_text_name(name) if is_text else name}{suffix}"] = value
        return state


def scaled_to_rank(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Return adapters that have the same effect with an alpha equal to the rank, in diffusers' names.

    Files with diffusers' names have no place for alpha that every release reads: those without metadata take the rank.
    Metadata would also store peft's complete configuration, which older releases of peft refuse.

    Args:
        state: tensors by diffusers' names.
        scale: alpha / rank.
    """
    return {name: value * scale if name.endswith(".lora_B.weight") else value for name, value in state.items()}


def _alpha(spec: LoraSpec) -> float:
    return spec.alpha if spec.alpha is not None else spec.rank

def _draw_masks(module: nn.Module) -> None:
    """Let adapters that the bank does not compute, e.g. of convolutions, draw their masks as it does."""
    from peft.tuners.lora.layer import LoraLayer  # noqa: PLC0415  slow to import

    for layer in module.modules():
        if isinstance(layer, LoraLayer) and isinstance(dropout := layer.lora_dropout["default"], nn.Dropout):
            layer.lora_dropout["default"] = DrawnDropout(dropout.p)



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
