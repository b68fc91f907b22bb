"""The class of each method; `finetune_contract.methods` holds the traits of each."""

from __future__ import annotations

from finetune_contract.methods import METHODS, MethodTraits
from finetune_contract.spec import Method as MethodName
from finetune_trainer.errors import ConfigError
from finetune_trainer.methods.controlnet import ControlNet
from finetune_trainer.methods.dreambooth import DreamBooth, DreamBoothLora
from finetune_trainer.methods.full import Full
from finetune_trainer.methods.lora import Lora
from finetune_trainer.methods.method import Method
from finetune_trainer.methods.textual_inversion import TextualInversion

METHOD_CLASSES: dict[MethodName, type[Method]] = {
    MethodName.FULL: Full,
    MethodName.LORA: Lora,
    MethodName.DREAMBOOTH: DreamBooth,
    MethodName.DREAMBOOTH_LORA: DreamBoothLora,
    MethodName.TEXTUAL_INVERSION: TextualInversion,
    MethodName.CONTROLNET: ControlNet,
}


def method_class(name: MethodName | None) -> type[Method]:
    """Return the class of the method that the manifest names.

    Raises:
        ConfigError: the method is missing or has no class.
    """
    return METHOD_CLASSES[_require(name)]


def method_traits(name: MethodName | None) -> MethodTraits:
    """Return the traits of the method that the manifest names.

    Raises:
        ConfigError: as `method_class`.
    """
    return METHODS[_require(name)]


def _require(name: MethodName | None) -> MethodName:
    if name is None or name not in METHOD_CLASSES:
        known = ", ".join(method.value for method in METHOD_CLASSES)
        raise ConfigError(f"training.method: {name.value if name else 'none'} is not supported; write one of {known}")
    return name
