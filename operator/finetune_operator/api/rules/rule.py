"""What a rule about a FineTuneJob is, and how one is made. `rules` is the table of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

Part = TypeVar("Part")


class Cause(StrEnum):
    """Kubernetes' reasons for refusing a field."""

    INVALID = "FieldValueInvalid"
    REQUIRED = "FieldValueRequired"
    FORBIDDEN = "FieldValueForbidden"


@dataclass(frozen=True)
class Scope(Generic[Part]):
    """A part of the manifest that rules look at: `self` in CEL, the predicate's argument in Python."""

    path: str
    """Where it is, e.g. 'spec.training'; 'spec.outputs[].to' for every item of a list."""
    part: type[Part]
    at_root: bool = False
    """Whether the CEL stands at the root: Kubernetes takes none below metadata."""


@dataclass(frozen=True)
class Rule(Generic[Part]):
    """One thing that must hold."""

    scope: Scope[Part]
    field: str
    """The field to blame, relative to the scope; empty: the scope itself."""
    cel: str
    holds: Callable[[Part], bool]
    sentence: str
    """What is wrong and what to write instead; names the field."""
    cause: Cause = Cause.INVALID

    @property
    def path(self) -> str:
        """The field to blame, e.g. 'spec.training.lora'."""
        return f"{self.scope.path}.{self.field}" if self.field else self.scope.path


def form(path: str, pattern: str, sentence: str) -> Rule[str]:
    """A text has the form of a pattern, which CEL (RE2) and Python read alike."""
    return Rule(
        Scope(path, str),
        "",
        f"self.matches(r'{pattern}')",
        lambda text: re.fullmatch(pattern, text) is not None,
        sentence,
    )


def cel_words(values: Iterable[StrEnum]) -> str:
    """A CEL list of texts."""
    return "[" + ", ".join(f"'{value}'" for value in values) + "]"
