"""Definition of a rule about a FineTuneJob. `spec` holds the table of all rules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

Part = TypeVar("Part")


class FieldErrorReason(StrEnum):
    """Kubernetes' reasons for refusing a field (FieldValueErrorReason of apiextensions)."""

    INVALID = "FieldValueInvalid"
    REQUIRED = "FieldValueRequired"
    FORBIDDEN = "FieldValueForbidden"


@dataclass(frozen=True)
class Scope(Generic[Part]):
    """The part of the manifest that a rule checks: `self` in CEL, the predicate's argument in Python."""

    path: str
    """Path of the part, e.g. 'spec.training'; 'spec.outputs[].to' for every item of a list."""
    part: type[Part]
    at_root: bool = False
    """Whether the CEL expression is attached to the root: Kubernetes allows none below metadata."""


@dataclass(frozen=True)
class Rule(Generic[Part]):
    """One condition that a manifest must satisfy."""

    scope: Scope[Part]
    field: str
    """Field that an error names, relative to the scope; empty: the scope itself."""
    cel: str
    holds: Callable[[Part], bool]
    message: str
    """The error and what to write instead; names the field."""
    reason: FieldErrorReason = FieldErrorReason.INVALID

    @property
    def path(self) -> str:
        """Path of the field that an error names, e.g. 'spec.training.lora'."""
        return f"{self.scope.path}.{self.field}" if self.field else self.scope.path


def form(path: str, pattern: str, message: str) -> Rule[str]:
    """Return the rule that a string matches a pattern, which CEL (RE2) and Python read alike."""
    return Rule(
        Scope(path, str),
        "",
        f"self.matches(r'{pattern}')",
        lambda text: re.fullmatch(pattern, text) is not None,
        message,
    )


def join_names(names: Sequence[str], conjunction: str = "and") -> str:
    """Return names as a list in a sentence, e.g. 'LoRA, DreamBooth and Full'."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {conjunction} {names[-1]}"


def cel_list(values: Iterable[StrEnum]) -> str:
    """Return a CEL list of strings."""
    return "[" + ", ".join(f"'{value}'" for value in values) + "]"
