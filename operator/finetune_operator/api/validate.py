"""Validates manifests: returns a FineTuneJob, or reports all problems, each with what to write instead.

The command line calls `parse_job` on a user's manifest. The plan calls `broken_rules` on stored jobs, because a job may
have been stored under an older definition.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from finetune_operator.api.job import API_VERSION, KIND, FineTuneJob
from finetune_operator.api.messages import describe_error, find_path
from finetune_operator.api.rules.rule import Rule, Scope
from finetune_operator.api.rules.spec import RULES

Manifest = Mapping[str, Any]
MAX_WHOLE = 2.0**53
"""Above this value a float does not represent every integer."""


@dataclass(frozen=True)
class Problem:
    """One problem of a manifest."""

    field: str
    """Path in the API server's notation, e.g. 'spec.outputs[0].format'; empty: the complete document."""
    message: str
    """The problem and what to write instead."""

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message


class InvalidJob(ValueError):  # noqa: N818  shorter than InvalidJobError
    """A manifest is not a valid FineTuneJob."""

    def __init__(self, problems: Iterable[Problem], source: str = "") -> None:
        self.problems = tuple(problems)
        self.source = source
        super().__init__(problems, source)

    @property
    def messages(self) -> list[str]:
        """One line for each problem: the field, the problem, and what to write instead."""
        return [f"{self.source}: {problem}" if self.source else str(problem) for problem in self.problems]

    def __str__(self) -> str:
        return "\n".join(self.messages)


def parse_job(document: object, *, source: str = "") -> FineTuneJob:
    """Parse a manifest as strictly as the API server does and check all rules.

    Args:
        document: a document read from YAML or JSON, or from the API server.
        source: origin of the document, e.g. a file name; a prefix of every message.

    Raises:
        InvalidJob: with all problems.
    """
    if not isinstance(document, Mapping):
        found = "empty" if document is None else "not a mapping of fields"
        raise InvalidJob([Problem("", f"the manifest is {found}; write apiVersion, kind, metadata and spec")], source)
    problems = list(_other_kind(document))
    if problems:
        # The fields of another kind cannot be checked.
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
    """Return the rules that a job breaks whose fields are valid by themselves."""
    return [
        _problem(rule, path)
        for scope, rules, _ in _by_scope()
        for path, part in _find(job, scope.path)
        for rule in rules
        if not rule.holds(part)
    ]


def _other_kind(document: Manifest) -> Iterator[Problem]:
    for field, expected in (("apiVersion", API_VERSION), ("kind", KIND)):
        found = document.get(field)
        if found is None:
            yield Problem(field, f"Required value; write {field}: {expected}")
        elif found != expected:
            yield Problem(field, f"Invalid value: {json.dumps(found, default=str)}; write {field}: {expected}")


def _as_stored(value: Any) -> Any:
    """Return a document as kubectl sends it and the API server reads it.

    Fields that are null are removed (null items of lists stay and are refused), and 200.0 becomes the integer 200.
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
        path = find_path(details, document)
        # A value that fits no branch of a union has one error for each branch.
        if path not in seen:
            seen.add(path)
            yield Problem(path, describe_error(details, path))


def _rule_problems(document: Manifest) -> Iterator[Problem]:
    """Check the rules on every part that is valid by itself; an invalid part has been reported already."""
    for scope, rules, reader in _by_scope():
        for path, value in _find(document, scope.path):
            part = _read(reader, value)
            if part is not None:
                yield from (_problem(rule, path) for rule in rules if not rule.holds(part))


@cache
def _by_scope() -> list[tuple[Scope[Any], list[Rule[Any]], TypeAdapter[Any]]]:
    """Return the rules of each scope, with the parser of its part."""
    rules: dict[Scope[Any], list[Rule[Any]]] = {}
    for rule in RULES:
        rules.setdefault(rule.scope, []).append(rule)
    return [(scope, together, TypeAdapter(scope.part)) for scope, together in rules.items()]


def _problem(rule: Rule[Any], path: str) -> Problem:
    return Problem(f"{path}.{rule.field}" if rule.field else path, rule.message)


def _read(reader: TypeAdapter[Any], value: object) -> Any:
    try:
        return reader.validate_json(_json(value), strict=True, by_alias=True, by_name=False)
    except ValidationError:
        return None


def _find(document: object, path: str) -> Iterator[tuple[str, object]]:
    """Yield path and value of each part that a scope's path matches: none, one, or every item of a list."""
    found: list[tuple[str, object]] = [("", document)]
    for name in path.split("."):
        found = [below for path_so_far, value in found for below in _step(path_so_far, value, name)]
    return iter(found)


def _step(path: str, value: object, name: str) -> Iterator[tuple[str, object]]:
    key = name.removesuffix("[]")
    found = _get(value, key)
    if found is None:
        return
    below = f"{path}.{key}" if path else key
    if not name.endswith("[]"):
        yield below, found
    elif isinstance(found, (list, tuple)):
        yield from ((f"{below}[{index}]", item) for index, item in enumerate(found))


def _get(value: object, key: str) -> object:
    """Return a field of a manifest, or of the model that was read from it; None if it is absent."""
    if isinstance(value, BaseModel):
        name = _attributes(type(value)).get(key)
        return getattr(value, name) if name is not None else None
    return value.get(key) if isinstance(value, Mapping) else None


@cache
def _attributes(model: type[BaseModel]) -> dict[str, str]:
    """Return the attributes of a model by the names of their fields in a manifest."""
    return {field.alias or name: name for name, field in model.model_fields.items()}


def _json(value: object) -> str:
    """Return JSON for strict parsing: only from JSON does pydantic accept strings for enums and lists for tuples."""
    return json.dumps(value, default=str)
