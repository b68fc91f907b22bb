"""Changed copies of frozen models, with the field names checked: pydantic's `model_copy` accepts unknown names."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel

M = TypeVar("M", bound=BaseModel)


def revise(model: M, **changes: Any) -> M:
    """Return a copy with some fields changed, or the model itself if nothing changes.

    Raises:
        AttributeError: the model has no such field.
    """
    # The comparison of two models is slow, and most changes of a reconcile are none.
    differing = {
        name: value for name, value in changes.items() if (old := getattr(model, name)) is not value and old != value
    }
    return model.model_copy(update=differing) if differing else model
