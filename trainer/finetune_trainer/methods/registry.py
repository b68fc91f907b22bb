"""The table of methods."""

from __future__ import annotations

from collections.abc import Callable

from finetune_contract.spec import Method as MethodName
from finetune_trainer.errors import ConfigError
from finetune_trainer.methods.lora import Lora
from finetune_trainer.methods.method import Method, MethodContext

METHODS: dict[MethodName, Callable[[MethodContext], Method]] = {
    MethodName.LORA: Lora,
}


def make_method(name: MethodName | None, context: MethodContext) -> Method:
    """Make the method that the manifest names, ready to train.

    Raises:
        ConfigError: it is not there, or the base does not fit it.
    """
    if name is None or name not in METHODS:
        known = ", ".join(method.value for method in METHODS)
        raise ConfigError(f"training.method: {name.value if name else 'none'} cannot be trained; use one of {known}")
    return METHODS[name](context)
