"""The table of methods."""

from __future__ import annotations

from finetune_contract.spec import Method as MethodName
from finetune_trainer.errors import ConfigError
from finetune_trainer.methods.controlnet import ControlNet
from finetune_trainer.methods.dreambooth import DreamBooth, DreamBoothLora
from finetune_trainer.methods.full import Full
from finetune_trainer.methods.lora import Lora
from finetune_trainer.methods.method import Method
from finetune_trainer.methods.textual_inversion import TextualInversion

METHODS: dict[MethodName, type[Method]] = {
    MethodName.FULL: Full,
    MethodName.LORA: Lora,
    MethodName.DREAMBOOTH: DreamBooth,
    MethodName.DREAMBOOTH_LORA: DreamBoothLora,
    MethodName.TEXTUAL_INVERSION: TextualInversion,
    MethodName.CONTROLNET: ControlNet,
}


def method_class(name: MethodName | None) -> type[Method]:
    """The method that the manifest names.

    Raises:
        ConfigError: it is not there.
    """
    if name is None or name not in METHODS:
        known = ", ".join(method.value for method in METHODS)
        raise ConfigError(f"training.method: {name.value if name else 'none'} cannot be trained; use one of {known}")
    return METHODS[name]
