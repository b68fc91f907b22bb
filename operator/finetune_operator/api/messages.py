"""Turns pydantic's errors into messages: the API server's text, then what to write instead.

`finetune` and `kubectl apply` report the same text: if the API server has a message for an error of form (an unknown
value, a bound), it is repeated here, followed by advice that the API server cannot give.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import yaml
from pydantic.alias_generators import to_camel
from pydantic_core import ErrorDetails

from finetune_contract.methods import WRITTEN_FORMATS
from finetune_contract.outputs.spec import OutputFormat
from finetune_operator.api import crd, yaml_text
from finetune_operator.api.flags import find_flag

UNWRITTEN_VALUES: dict[str, frozenset[str]] = {"spec.outputs[].format": frozenset(OutputFormat) - WRITTEN_FORMATS}
"""Values of the schema that no method supports yet: messages do not recommend them."""

_HINTS = {
    "integer": "write an integer, e.g. 100",
    "number": "write a number, e.g. 0.0001",
    "boolean": "write true or false",
    "string": "write a string, in quotes if it looks like a number or a boolean",
    "array": "write a list, with one '- ' for each item",
    "object": "write its fields, indented below it",
    "integer,string": "write an integer or a string, e.g. 8, 500m or 32Gi",
}
_PLAIN_TYPES: dict[str, tuple[type, ...]] = {"integer": (int,), "number": (int, float), "boolean": (bool,)}
_WITHOUT_POINT = re.compile(r"([-+]?[0-9]+)[eE]([-+]?[0-9]+)")
"""A number such as 1e-4: PyYAML, Ansible and other readers of YAML 1.1 read it as text, quoted or not."""
_INDEX = r"\[\d+\]"
MAX_LISTED = 12
"""Number of fields that a message lists; of larger parts it names the command that lists them."""
MAX_SHOWN = 80
"""Characters of a wrong value that a message repeats."""


def find_path(error: ErrorDetails, document: Mapping[str, Any]) -> str:
    """Return the path of an error, e.g. 'spec.outputs[0].format', without pydantic's names of union branches."""
    path = ""
    value: Any = document
    for key in error["loc"]:
        if isinstance(key, int) and isinstance(value, list):
            path, value = f"{path}[{key}]", value[key]
        elif isinstance(value, dict) and (key in value or error["type"] == "missing"):
            path, value = f"{path}.{key}" if path else str(key), value.get(key)
        else:
            break
    return path


def describe_error(error: ErrorDetails, path: str) -> str:
    """Return the problem of the field at a path and what to write instead."""
    describe = _MESSAGES.get(error["type"])
    if describe is not None:
        return describe(error, path)
    if error["type"].endswith(("_type", "_parsing")) or "int_from" in error["type"]:
        return _wrong_type(error, path)
    return f"Invalid value: {show(error['input'])}: {error['msg']}"


def show(value: object) -> str:
    """Return a value as JSON, shortened to MAX_SHOWN characters."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def _bound(relation: str, key: str) -> Callable[[ErrorDetails, str], str]:
    def describe(error: ErrorDetails, _: str) -> str:
        bound = error["ctx"][key]
        plain = int(bound) if bound == int(bound) else bound
        return f"Invalid value: {show(error['input'])}: should be {relation} {plain}"

    return describe


def _multiple(error: ErrorDetails, _: str) -> str:
    factor = error["ctx"]["multiple_of"]
    below = error["input"] // factor * factor
    problem = f"Invalid value: {show(error['input'])}: should be a multiple of {factor}"
    return f"{problem}; write {below} or {below + factor}"


def _too_short(error: ErrorDetails, _: str) -> str:
    return f"Invalid value: {show(error['input'])}: should be at least {error['ctx']['min_length']} chars long"


def _too_long(error: ErrorDetails, _: str) -> str:
    return f"Too long: may not be more than {error['ctx']['max_length']} bytes"


def _pattern_mismatch(error: ErrorDetails, _: str) -> str:
    return f"Invalid value: {show(error['input'])}: should match '{error['ctx']['pattern']}'"


def _too_few(error: ErrorDetails, _: str) -> str:
    return f"Invalid value: {error['ctx']['actual_length']}: should have at least {error['ctx']['min_length']} items"


def _too_many(error: ErrorDetails, _: str) -> str:
    num_items = len(error["input"])
    return f"Too many: {num_items}: must have at most {error['ctx']['max_length']} items"


def _missing(_: ErrorDetails, path: str) -> str:
    node = _schema(path)
    name = path.rpartition(".")[2]
    meaning = node and node.get("description")
    return f"Required value; write {name} ({_lower_first(meaning)})" if meaning else f"Required value; write {name}"


def _lower_first(text: str) -> str:
    """Return a description for the middle of a sentence; names such as ControlNet keep their capitals."""
    return text[:1].lower() + text[1:] if text.partition(" ")[0][1:].islower() else text


def _unsupported(error: ErrorDetails, path: str) -> str:
    known = (_schema(path) or {}).get("enum", [])
    if not isinstance(error["input"], str) and all(isinstance(value, str) for value in known):
        return _wrong_type(error, path)
    problem = f"Unsupported value: {show(error['input'])}: supported values: {', '.join(map(show, known))}"
    unwritten = UNWRITTEN_VALUES.get(_generic(path), frozenset())
    written = [value for value in known if isinstance(value, str) and value not in unwritten]
    guess = closest(str(error["input"]), written) or (written[0] if unwritten else None)
    return f"{problem}; write {guess}" if guess else problem


def _wrong_type(error: ErrorDetails, path: str) -> str:
    node = _schema(path) or {}
    kind = node.get("type", "integer,string")
    hint = _without_quotes(error["input"], kind) or _HINTS[kind]
    why = " (YAML 1.1 reads a number without a decimal point as text)" if ".0e" in hint else ""
    return f"Invalid value: {show(error['input'])}: must be of type {kind}{why}; {hint}"


def _without_quotes(value: object, kind: str) -> str | None:
    """Return the advice for a quoted number or boolean, e.g. '200' or 'yes'; None for other strings."""
    if not isinstance(value, str) or kind not in _PLAIN_TYPES:
        return None
    try:
        plain = yaml_text.load(value)
    except yaml.YAMLError:
        return None
    fits = isinstance(plain, _PLAIN_TYPES[kind]) and (kind == "boolean") == isinstance(plain, bool)
    if not fits:
        return None
    match = _WITHOUT_POINT.fullmatch(value)
    return f"write {match[1]}.0e{match[2]}" if match else f"write {json.dumps(plain)} without quotes"


def _unknown(_error: ErrorDetails, path: str) -> str:
    """Return the message for a field that is misspelt, in the wrong section, or a flag of the diffusers scripts."""
    parent, _, name = path.rpartition(".")
    known = list((_schema(parent) or {}).get("properties", {}))
    guess, flag = closest(to_camel(name), known), find_flag(name)
    if flag is not None and (flag.field is None or flag.write is not None):
        return f"unknown field; {flag.advice}"
    if flag is not None and flag.field != f"{parent}.{guess}":
        guess = flag.field
    if guess is None:
        elsewhere = {*_paths_by_name().get(name, ()), *_paths_by_name().get(to_camel(name), ())}
        guess = elsewhere.pop() if len(elsewhere) == 1 else None
    if guess is not None:
        return f"unknown field; write {guess}"
    if len(known) > MAX_LISTED:
        return f"unknown field; to list the fields here: kubectl explain finetunejob.{re.sub(_INDEX, '', parent)}"
    return f"unknown field; the fields here are {', '.join(known)}"


_MESSAGES: dict[str, Callable[[ErrorDetails, str], str]] = {
    "missing": _missing,
    "extra_forbidden": _unknown,
    "enum": _unsupported,
    "greater_than_equal": _bound("greater than or equal to", "ge"),
    "greater_than": _bound("greater than", "gt"),
    "less_than_equal": _bound("less than or equal to", "le"),
    "less_than": _bound("less than", "lt"),
    "multiple_of": _multiple,
    "string_too_short": _too_short,
    "string_too_long": _too_long,
    "string_pattern_mismatch": _pattern_mismatch,
    "too_short": _too_few,
    "too_long": _too_many,
}


def closest(word: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most similar to a word, ignoring case; None if none is similar."""
    folded = {candidate.casefold(): candidate for candidate in known}
    found = difflib.get_close_matches(word.casefold(), folded, n=1, cutoff=0.7)
    return folded[found[0]] if found else None


def _schema(path: str) -> dict[str, Any] | None:
    """Return the schema of the field at a path; None if there is no such field."""
    try:
        return crd.find(_generic(path))
    except KeyError:
        return None


def _generic(path: str) -> str:
    """Return a path without the indexes of list items, e.g. 'spec.outputs[].format'."""
    return re.sub(_INDEX, "[]", path)


@cache
def _paths_by_name() -> dict[str, list[str]]:
    """Return the paths of each field name of the spec."""
    found: dict[str, list[str]] = {}
    for path in _paths("spec", crd.find("spec")):
        found.setdefault(path.rpartition(".")[2], []).append(path)
    return found


def _paths(path: str, schema: Mapping[str, Any]) -> Iterator[str]:
    for name, child in schema.get("properties", {}).items():
        yield f"{path}.{name}"
        yield from _paths(f"{path}.{name}", child)
