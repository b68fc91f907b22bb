"""Base class and string types of all that users write; `spec`, `input_spec` and the operator's `api` use them."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel


class SpecModel(BaseModel):
    """Base of everything that a user writes: camelCase in JSON, unknown fields refused, immutable."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, frozen=True, extra="forbid", allow_inf_nan=False
    )


# Every string and list has a bound: the API server refuses CEL rules whose cost it cannot bound.
Location = Annotated[str, Field(min_length=1, max_length=1024)]
"""A hub id, path or URL."""
Word = Annotated[str, Field(min_length=1, max_length=128)]
"""A name: of a column, a split, a branch, a token."""
Prompt = Annotated[str, Field(min_length=1, max_length=2000)]
"""Text that describes an image."""
Argument = Annotated[str, Field(max_length=4096)]
"""One argument of a command line; may be empty."""
