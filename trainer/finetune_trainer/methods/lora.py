"""Text-to-image LoRA (https://arxiv.org/abs/2106.09685): low-rank updates of the UNet's attention projections."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from finetune_contract.spec import LoraSpec, OutputFormat, TrainingSpec
from finetune_trainer.errors import ConfigError
from finetune_trainer.methods.kohya import to_kohya
from finetune_trainer.methods.lora_linear import use_fast_linears
from finetune_trainer.methods.method import MethodContext
from finetune_trainer.methods.unet_method import UNetMethod
from finetune_trainer.tensor_file import write_tensors

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
TEXT_MODULES = ("q_proj", "k_proj", "v_proj", "out_proj")
"""What is adapted of a text encoder."""


class Lora(UNetMethod):
    """LoRA on the UNet, and on the text encoders where asked; see `Method`."""

    formats: ClassVar = frozenset({OutputFormat.DIFFUSERS, OutputFormat.KOHYA, OutputFormat.WEBUI})

    def __init__(self, context: MethodContext) -> None:
        super().__init__(context)
        self._spec = context.training.lora or LoraSpec()
        # DoRA takes norms of the frozen weights in every step.
        self._uses_weights = self._spec.use_dora
        _add_adapter(self._unet, self._spec)
        use_fast_linears(self._unet)
        self._adapted: dict[str, Any] = {"unet": self._unet}
        if self.encodes_text(context.training):
            for part in self._load_text(context.dtype).parts:
                part.model.add_adapter(_config(self._spec, TEXT_MODULES))
                use_fast_linears(part.model)
                self._adapted[part.name] = part.model
                self._modules.append(part.model)
        self._finish(
            {
                name if module is self._unet else f"{prefix}.{name}": parameter
                for prefix, module in self._adapted.items()
                for name, parameter in module.named_parameters()
                if parameter.requires_grad
            }
        )

    @staticmethod
    def encodes_text(training: TrainingSpec) -> bool:
        """Whether the text encoders are adapted."""
        return training.lora is not None and training.lora.train_text_encoder

    def export(self, output_format: OutputFormat, folder: Path) -> list[Path]:
        """Write one file: as diffusers' load_lora_weights reads it, or as kohya's scripts and the web UIs name it."""
        assert output_format in self.formats
        path = folder / WEIGHTS_NAME
        if output_format is OutputFormat.DIFFUSERS:
            write_tensors(path, self._state(), {"format": "pt", "lora_adapter_metadata": self._metadata()})
            return [path]
        alpha = self._spec.alpha if self._spec.alpha is not None else self._spec.rank
        path = folder / "lora.safetensors"
        write_tensors(path, to_kohya(self._state(), alpha, self._unet.config), {"format": "pt"})
        return [path]

    def _state(self) -> dict[str, Tensor]:
        """All adapters by diffusers' names."""
        from peft.utils import get_peft_model_state_dict  # noqa: PLC0415  slow to import

        state: dict[str, Tensor] = {}
        for prefix, module in self._adapted.items():
            # Some releases of transformers have this level and some do not; the files' names have it.
            inner = "" if module is self._unet or hasattr(module, "text_model") else "text_model."
            for name, value in get_peft_model_state_dict(module).items():
                # The loader of text encoders wants the level that peft leaves out.
                is_bare = module is not self._unet and name.endswith(".lora_magnitude_vector")
                state[f"{prefix}.{inner}{name}{'.weight' if is_bare else ''}"] = value
        return state

    def _metadata(self) -> str:
        metadata: dict[str, Any] = {}
        for prefix, module in self._adapted.items():
            config = module.peft_config["default"].to_dict()
            # peft holds the target modules as a set, whose order differs from process to process.
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


def _add_adapter(unet: Any, spec: LoraSpec) -> None:
    try:
        unet.add_adapter(_config(spec, spec.target_modules))
    except ValueError as error:
        known = sorted(
            {name.rsplit(".", 1)[-1] for name, module in unet.named_modules() if isinstance(module, nn.Linear)}
        )
        raise ConfigError(
            f"training.lora.targetModules: {', '.join(spec.target_modules)} match no module of the base's UNet; "
            f"its linear modules end with {', '.join(known)}"
        ) from error
