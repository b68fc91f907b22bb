"""Changed copies of frozen models, with the field names checked: `model_copy` takes any."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel

M = TypeVar("M", bound=BaseModel)


def revise(model: M, **changes: Any) -> M:
    """A copy with some fields changed; the model itself where nothing changes.

    Raises:
        AttributeError: it has no such field.
    """
    news = {name: value for name, value in changes.items() if getattr(model, name) != value}
    return model.model_copy(update=news) if news else model
