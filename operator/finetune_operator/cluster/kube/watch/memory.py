"""Smaller models, for those that are kept by the thousand.

Pydantic keeps beside each model the set of its fields that were given. It is as large as the fields themselves, and
nothing here asks for it.
"""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel

Model = TypeVar("Model", bound=BaseModel)

_NOTHING_GIVEN: set[str] = set()
"""Shared by all, and never changed: a copy of a model has a set of its own."""


def lean(model: Model) -> Model:
    """Let a frozen model, and all models in it, share one such set; return the model.

    Not for models of which `model_fields_set` or `exclude_unset` is asked.
    """
    object.__setattr__(model, "__pydantic_fields_set__", _NOTHING_GIVEN)
    for value in model.__dict__.values():
        if isinstance(value, BaseModel):
            lean(value)
        elif isinstance(value, tuple):
            for item in value:
                if isinstance(item, BaseModel):
                    lean(item)
    return model
