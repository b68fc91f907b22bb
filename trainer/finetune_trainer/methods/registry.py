"""The table of methods."""

from __future__ import annotations

from finetune_contract.spec import Method as MethodName
from finetune_trainer.errors import ConfigError
from finetune_trainer.methods.lora import Lora
from finetune_trainer.methods.method import Method

METHODS: dict[MethodName, type[Method]] = {
    MethodName.LORA: Lora,
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
