"""Reduce the memory of pydantic models that are kept by the thousand.

Pydantic stores with each model the set of its fields that were set explicitly. The set is as large as the fields
themselves, and the operator does not use it.
"""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel

Model = TypeVar("Model", bound=BaseModel)

_NO_FIELDS: set[str] = set()
"""Shared by all compacted models and never changed: `model_copy` creates a new set."""


def compact(model: Model) -> Model:
    """Replace the field set of a frozen model, and of all models in it, by a shared empty set; return the model.

    Not for models whose `model_fields_set` is read or that are dumped with `exclude_unset`.
    """
    object.__setattr__(model, "__pydantic_fields_set__", _NO_FIELDS)
    for value in model.__dict__.values():
        if isinstance(value, BaseModel):
            compact(value)
        elif isinstance(value, tuple):
            for item in value:
                if isinstance(item, BaseModel):
                    compact(item)
    return model
