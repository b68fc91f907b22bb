"""Combines the rules that read large objects into few CEL expressions at the root, which writes of the status skip.

The API server evaluates all rules of the CRD in every write, writes of the status included. To read one field in a rule
it copies the schema of all fields next to it, twice. The rules of `spec`, `spec.training` and `spec.topology` would
cost a write of the status more than everything else in it, although it cannot change the spec.

Only at the root a rule sees spec and status. There, a write of the status is recognized by its count (see `edits`).
Each expression combines the rules with the same reason; its message names the field of each broken rule.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_operator.api.rules.edits import BEFORE_THE_FIRST_ATTEMPT, FIXED, REASON, WRITES_STATUS
from finetune_operator.api.rules.rule import FieldErrorReason, Rule

PARTS: Mapping[str, str] = {"spec": "self.spec", "spec.training": "training", "spec.topology": "self.spec.topology"}
"""The scopes whose rules are combined, and each in CEL. Every stored job has these parts.

The largest one is a variable. The API server bounds the cost of loops only over lists whose path is written in full.
"""
FIELD = "spec"
"""The field that the API server names; the message contains the complete paths."""
FALLBACK = "too many problems for one message; write: finetune validate FILE"
"""Message if the expression of the message fails, because its result would be too long."""
_HAS_STATUS = "has(self.status)"
_SAME_SPEC = "self.spec == oldSelf.spec"


@dataclass(frozen=True)
class CombinedRule:
    """One entry of x-kubernetes-validations at the root."""

    cel: str
    message: str
    """CEL expression of the message."""
    reason: FieldErrorReason


@dataclass(frozen=True)
class _Check:
    cel: str
    path: str
    message: str

    @property
    def problem(self) -> str:
        """CEL expression: a sentence with the path and the message, empty if the check holds."""
        return f"({self.cel} ? '' : {json.dumps(f'{self.path}: {self.message}. ', ensure_ascii=False)})"


def is_combined(rule: Rule[Any]) -> bool:
    """Return whether a rule is part of a combined one."""
    return rule.scope.path in PARTS


def combine(rules: Iterable[Rule[Any]]) -> Iterator[CombinedRule]:
    """Yield the combined rules: those about fixed fields, and two for each reason.

    The first of the two checks a job without a status, which includes its creation. The second checks edits, and
    accepts those that keep the spec: the job may have been stored under an older definition.
    """
    yield _fixed_fields()
    checks: dict[FieldErrorReason, list[_Check]] = {}
    for rule in rules:
        if is_combined(rule):
            checks.setdefault(rule.reason, []).append(_Check(f"({_expression(rule)})", rule.path, rule.message))
    for reason, together in checks.items():
        all_hold, message = _all_hold(together), _describe(together)
        yield CombinedRule(f"{_HAS_STATUS} || {all_hold}", message, reason)
        yield CombinedRule(f"!{_HAS_STATUS} || {WRITES_STATUS} || {all_hold} || {_SAME_SPEC}", message, reason)


def _fixed_fields() -> CombinedRule:
    """Return the transition rule of the fields that must not change."""
    checks = [_Check(f"({fixed.cel})", fixed.path, fixed.message) for fixed in FIXED]
    always = " && ".join(check.cel for check, fixed in zip(checks, FIXED, strict=True) if fixed.always)
    later = " && ".join(check.cel for check, fixed in zip(checks, FIXED, strict=True) if not fixed.always)
    cel = f"{WRITES_STATUS} || {always} && ({BEFORE_THE_FIRST_ATTEMPT} || {later})"
    guarded = [
        check if fixed.always else _Check(f"({BEFORE_THE_FIRST_ATTEMPT} || {check.cel})", check.path, check.message)
        for check, fixed in zip(checks, FIXED, strict=True)
    ]
    return CombinedRule(cel, _problems(guarded), REASON)


def _expression(rule: Rule[Any]) -> str:
    """Return a rule as CEL for the root."""
    cel = re.sub(r"\bself\b", PARTS[rule.scope.path], rule.cel)
    return cel.replace("self.spec.training.", "training.")


def _all_hold(checks: Sequence[_Check]) -> str:
    return f"[self.spec.training].all(training, {' && '.join(check.cel for check in checks)})"


def _describe(checks: Sequence[_Check]) -> str:
    return f"[self.spec.training].map(training, {_problems(checks)})[0]"


def _problems(checks: Sequence[_Check]) -> str:
    # Not a list that is joined: the API server cannot bound the cost of that.
    return " + ".join(check.problem for check in checks)
