"""From a manifest to a FineTuneJob, or to sentences that say what to write instead: all of them, not only the first.

The command line calls `parse_job` on what a person wrote; the plan calls `broken_rules` on what the API server stored,
for it may have been stored under an older definition.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from finetune_operator.api.job import API_VERSION, KIND, FineTuneJob
from finetune_operator.api.messages import describe_error, document_path
from finetune_operator.api.rules.rule import Rule, Scope
from finetune_operator.api.rules.spec import RULES

Manifest = Mapping[str, Any]
MAX_WHOLE = 2.0**53
"""From here on a float does not hold every whole number."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a manifest."""

    field: str
    """Where, as the API server writes it, e.g. 'spec.outputs[0].format'; empty: the whole document."""
    sentence: str
    """What is wrong and what to write instead."""

    def __str__(self) -> str:
        return f"{self.field}: {self.sentence}" if self.field else self.sentence


class InvalidJob(ValueError):  # noqa: N818  it is named for what it says
    """A manifest cannot be run."""

    def __init__(self, problems: Iterable[Problem], source: str = "") -> None:
        self.problems = tuple(problems)
        self.source = source
        super().__init__(problems, source)

    @property
    def sentences(self) -> list[str]:
        """One line for each problem: the field, what is wrong, what to write instead."""
        return [f"{self.source}: {problem}" if self.source else str(problem) for problem in self.problems]

    def __str__(self) -> str:
        return "\n".join(self.sentences)


def parse_job(document: object, *, source: str = "") -> FineTuneJob:
    """Read a manifest, as strictly as the API server does, and hold it to all rules.

    Args:
        document: what YAML or JSON gave, or the API server.
        source: where it came from, e.g. a file's name; put before every sentence.

    Raises:
        InvalidJob: with everything that is wrong with it.
    """
    if not isinstance(document, Mapping):
        found = "empty" if document is None else "no mapping of fields"
        raise InvalidJob([Problem("", f"the manifest is {found}; write apiVersion, kind, metadata and spec")], source)
    problems = list(_not_ours(document))
    if problems:
        # What another kind's fields should be is not ours to say.
        raise InvalidJob(problems, source)
    manifest: Manifest = _as_stored(document)
    job: FineTuneJob | None = None
    try:
        job = FineTuneJob.model_validate_json(_json(manifest), strict=True, by_alias=True, by_name=False)
    except ValidationError as error:
        problems.extend(_field_problems(error, manifest))
    problems.extend(_rule_problems(manifest))
    if job is None or problems:
        raise InvalidJob(problems, source)
    return job


def broken_rules(job: FineTuneJob) -> list[Problem]:
    """What is wrong with a job whose fields are all right by themselves."""
    return list(_rule_problems(job.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"status"})))


def _not_ours(document: Manifest) -> Iterator[Problem]:
    for field, expected in (("apiVersion", API_VERSION), ("kind", KIND)):
        found = document.get(field)
        if found is None:
            yield Problem(field, f"Required value: write {field}: {expected}")
        elif found != expected:
            yield Problem(field, f"Invalid value: {json.dumps(found, default=str)}: write {field}: {expected}")


def _as_stored(value: Any) -> Any:
    """A document as kubectl sends it and the API server reads it.

    Fields that are null are left out (an item of a list is something that should be there), and 200.0 is the whole
    number that it is.
    """
    if isinstance(value, Mapping):
        return {name: _as_stored(below) for name, below in value.items() if below is not None}
    if isinstance(value, (list, tuple)):
        return [_as_stored(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < MAX_WHOLE:
        return int(value)
    return value


def _field_problems(error: ValidationError, document: Manifest) -> Iterator[Problem]:
    seen: set[str] = set()
    for details in error.errors(include_url=False):
        path = document_path(details, document)
        # A value that fits no branch of a union has one error for each branch.
        if path not in seen:
            seen.add(path)
            yield Problem(path, describe_error(details, path))


def _rule_problems(document: Manifest) -> Iterator[Problem]:
    """Try the rules on every part that can be read; a part with a wrong field has had its sentence."""
    for scope, rules, reader in _by_scope():
        for path, value in _find(document, scope.path):
            part = _read(reader, value)
            if part is not None:
                yield from (_problem(rule, path) for rule in rules if not rule.holds(part))


@cache
def _by_scope() -> list[tuple[Scope[Any], list[Rule[Any]], TypeAdapter[Any]]]:
    """The rules of each scope, with what reads it."""
    rules: dict[Scope[Any], list[Rule[Any]]] = {}
    for rule in RULES:
        rules.setdefault(rule.scope, []).append(rule)
    return [(scope, together, TypeAdapter(scope.part)) for scope, together in rules.items()]


def _problem(rule: Rule[Any], path: str) -> Problem:
    return Problem(f"{path}.{rule.field}" if rule.field else path, rule.sentence)


def _read(reader: TypeAdapter[Any], value: object) -> Any:
    try:
        return reader.validate_json(_json(value), strict=True, by_alias=True, by_name=False)
    except ValidationError:
        return None


def _find(document: object, path: str) -> Iterator[tuple[str, object]]:
    """Where a scope's path leads to in a document: nowhere, to one place, or to every item of a list."""
    found: list[tuple[str, object]] = [("", document)]
    for name in path.split("."):
        found = [below for place, value in found for below in _step(place, value, name)]
    return iter(found)


def _step(place: str, value: object, name: str) -> Iterator[tuple[str, object]]:
    key = name.removesuffix("[]")
    if not isinstance(value, Mapping) or value.get(key) is None:
        return
    below = f"{place}.{key}" if place else key
    if not name.endswith("[]"):
        yield below, value[key]
    elif isinstance(value[key], (list, tuple)):
        yield from ((f"{below}[{index}]", item) for index, item in enumerate(value[key]))


def _json(value: object) -> str:
    """What strict reading needs: pydantic takes texts for enums and lists for tuples from JSON only."""
    return json.dumps(value, default=str)
