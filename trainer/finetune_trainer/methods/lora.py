"""Text-to-image LoRA (https://arxiv.org/abs/2106.09685): low-rank updates of the denoiser's attention layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from finetune_contract.methods import encodes_text
from finetune_contract.spec import LoraSpec, OutputFormat
from finetune_trainer.errors import ConfigError
from finetune_trainer.methods.denoiser_method import DenoiserMethod
from finetune_trainer.methods.kohya import to_kohya
from finetune_trainer.methods.lora_linear import use_fast_linears
from finetune_trainer.methods.method import MethodContext
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
        use_fast_linears(self._denoiser)
        self._adapted: dict[str, Any] = {context.family.denoiser_name: self._denoiser}
        if encodes_text(context.training):
            for part in self._load_text(context.dtype).parts:
                part.model.add_adapter(_config(self._spec, TEXT_MODULES))
                use_fast_linears(part.model)
                self._adapted[part.name] = part.model
                self._modules.append(part.model)
        self._finish(
            {
                name if module is self._denoiser else f"{prefix}.{name}": parameter
                for prefix, module in self._adapted.items()
                for name, parameter in module.named_parameters()
                if parameter.requires_grad
            }
        )

    def export(self, output_format: OutputFormat, folder: Path) -> list[Path]:
        """Write one file, for diffusers' load_lora_weights or with the names of kohya's scripts and the web UIs."""
        path = folder / WEIGHTS_NAME
        if output_format is OutputFormat.DIFFUSERS:
            write_tensors(path, self._state(), {"format": "pt", "lora_adapter_metadata": self._metadata()})
            return [path]
        assert output_format in (OutputFormat.KOHYA, OutputFormat.WEBUI)
        alpha = self._spec.alpha if self._spec.alpha is not None else self._spec.rank
        path = folder / "lora.safetensors"
        write_tensors(path, to_kohya(self._state(), alpha, self._family.kohya_name), {"format": "pt"})
        return [path]

    def _state(self) -> dict[str, Tensor]:
        """Return all adapters by diffusers' names."""
        from peft.utils import get_peft_model_state_dict  # noqa: PLC0415  slow to import

        state: dict[str, Tensor] = {}
        for prefix, module in self._adapted.items():
            # Only some releases of transformers have this level; the names in the files always have it.
            inner = "" if module is self._denoiser or hasattr(module, "text_model") else "text_model."
            for name, value in get_peft_model_state_dict(module).items():
                # diffusers' loader of text encoders expects the suffix that peft omits.
                is_bare = module is not self._denoiser and name.endswith(".lora_magnitude_vector")
                state[f"{prefix}.{inner}{name}{'.weight' if is_bare else ''}"] = value
        return state

    def _metadata(self) -> str:
        metadata: dict[str, Any] = {}
        for prefix, module in self._adapted.items():
            config = module.peft_config["default"].to_dict()
            # peft keeps the target modules in a set, whose order differs between processes.
            metadata |= {
                f"{prefix}.{key}": sorted(value) if isinstance(value, set) else value for key, value in config.items()
            }
        return json.dumps(metadata, sort_keys=True, default=str)


def _config(spec: LoraSpec, target_modules: tuple[str, ...]) -> Any:
    from peft import LoraConfig  # noqa: PLC0415  slow to import

    return LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha if spec.alpha is not None else spec.rank,
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
