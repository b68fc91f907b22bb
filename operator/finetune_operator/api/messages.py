"""From an error of pydantic to a sentence, in the API server's own words, and then what to write instead.

A person meets the same words from `finetune` and from `kubectl apply`: where the API server has words for an error of
form (an unknown value, a bound), these are repeated here, and a hint is added that only we can give.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import yaml
from pydantic.alias_generators import to_camel, to_snake
from pydantic_core import ErrorDetails

from finetune_operator.api import crd, yaml_text

FLAGS = {
    "train_batch_size": "spec.training.batchSize",
    "max_train_steps": "spec.training.steps",
    "num_train_epochs": "spec.training.epochs",
    "gradient_accumulation_steps": "spec.training.gradientAccumulation",
    "lr": "spec.training.learningRate",
    "mixed_precision": "spec.training.precision",
    "use_ema": "spec.training.ema",
    "pretrained_model_name_or_path": "spec.model.base",
    "dataset_name": "spec.dataset.source",
    "train_data_dir": "spec.dataset.source",
    "max_train_samples": "spec.dataset.maxSamples",
    "image_column": "spec.dataset.columns.image",
    "caption_column": "spec.dataset.columns.caption",
    "validation_prompt": "spec.training.validation.prompts",
    "instance_prompt": "spec.training.dreambooth.instancePrompt",
    "class_prompt": "spec.training.dreambooth.classPrompt",
    "placeholder_token": "spec.training.textualInversion.placeholderToken",
    "initializer_token": "spec.training.textualInversion.initializerToken",
    "checkpointing_steps": "spec.checkpoint.interval.steps",
    "checkpoints_total_limit": "spec.checkpoint.keep",
}
"""Flags of the diffusers scripts that people know by heart, and where the same thing is written here."""

_HINTS = {
    "integer": "write a whole number",
    "number": "write a number, e.g. 0.0001",
    "boolean": "write true or false",
    "string": "write a text, in quotes where it looks like something else",
    "array": "write a list, e.g. [one, two]",
    "object": "write its fields below it",
    "integer,string": "write a whole number or a text, e.g. 8, 500m or 32Gi",
}
_PLAIN_TYPES: dict[str, tuple[type, ...]] = {"integer": (int,), "number": (int, float), "boolean": (bool,)}
MAX_SHOWN = 80
"""Characters of a wrong value that a sentence repeats."""


def document_path(error: ErrorDetails, document: Mapping[str, Any]) -> str:
    """Where an error is, e.g. 'spec.outputs[0].format', without what pydantic adds to tell a union's branches apart."""
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
    """Say what is wrong with the field at a path, and what to write instead."""
    describe = _SENTENCES.get(error["type"])
    if describe is not None:
        return describe(error, path)
    if error["type"].endswith(("_type", "_parsing")) or "int_from" in error["type"]:
        return _wrong_type(error, path)
    return f"Invalid value: {show(error['input'])}: {error['msg']}"


def show(value: object) -> str:
    """A value as JSON, cut where it is long."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def _bound(words: str, key: str) -> Callable[[ErrorDetails, str], str]:
    def describe(error: ErrorDetails, _: str) -> str:
        bound = error["ctx"][key]
        plain = int(bound) if bound == int(bound) else bound
        return f"Invalid value: {show(error['input'])}: should be {words} {plain}"

    return describe


def _multiple(error: ErrorDetails, _: str) -> str:
    factor = error["ctx"]["multiple_of"]
    below = error["input"] // factor * factor
    words = f"Invalid value: {show(error['input'])}: should be a multiple of {factor}"
    return f"{words}; write {below} or {below + factor}"


def _too_short(error: ErrorDetails, _: str) -> str:
    return f"Invalid value: {show(error['input'])}: should be at least {error['ctx']['min_length']} chars long"


def _too_long(error: ErrorDetails, _: str) -> str:
    return f"Too long: may not be more than {error['ctx']['max_length']} bytes"


def _other_form(error: ErrorDetails, _: str) -> str:
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
    return f"Required value; write {name} ({meaning})" if meaning else f"Required value; write {name}"


def _unsupported(error: ErrorDetails, path: str) -> str:
    known = (_schema(path) or {}).get("enum", [])
    if not isinstance(error["input"], str):
        return _wrong_type(error, path)
    words = f"Unsupported value: {show(error['input'])}: supported values: {', '.join(map(show, known))}"
    guess = closest(error["input"], known)
    return f"{words}; write {guess}" if guess else words


def _wrong_type(error: ErrorDetails, path: str) -> str:
    node = _schema(path) or {}
    kind = node.get("type", "integer,string")
    hint = _without_quotes(error["input"], kind) or _HINTS[kind]
    return f"Invalid value: {show(error['input'])}: must be of type {kind}; {hint}"


def _without_quotes(value: object, kind: str) -> str | None:
    """What to write where a text would be right as a number or a truth value: '200', 'yes'."""
    if not isinstance(value, str) or kind not in _PLAIN_TYPES:
        return None
    try:
        plain = yaml_text.load(value)
    except yaml.YAMLError:
        return None
    fits = isinstance(plain, _PLAIN_TYPES[kind]) and (kind == "boolean") == isinstance(plain, bool)
    return f"write {json.dumps(plain)} without quotes" if fits else None


def _unknown(_error: ErrorDetails, path: str) -> str:
    """An unknown field may be misspelt, at the wrong place, or a flag of the diffusers scripts."""
    parent, _, name = path.rpartition(".")
    known = list((_schema(parent) or {}).get("properties", {}))
    guess = closest(to_camel(name), known)
    if guess is None:
        elsewhere = {*_places().get(name, ()), *_places().get(to_camel(name), ())}
        guess = FLAGS.get(to_snake(name)) or (elsewhere.pop() if len(elsewhere) == 1 else None)
    return f"unknown field; write {guess}" if guess else f"unknown field; known here are {', '.join(known)}"


_SENTENCES: dict[str, Callable[[ErrorDetails, str], str]] = {
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
    "string_pattern_mismatch": _other_form,
    "too_short": _too_few,
    "too_long": _too_many,
}


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that somebody may have meant; letters' case does not count."""
    folded = {candidate.casefold(): candidate for candidate in known}
    found = difflib.get_close_matches(word.casefold(), folded, n=1, cutoff=0.7)
    return folded[found[0]] if found else None


def _schema(path: str) -> dict[str, Any] | None:
    """The schema of the field at a path; None where none is known."""
    try:
        return crd.find(re.sub(r"\[\d+\]", "[]", path))
    except KeyError:
        return None


@cache
def _places() -> dict[str, list[str]]:
    """Where each name of the spec stands."""
    places: dict[str, list[str]] = {}
    for path in _paths("spec", crd.find("spec")):
        places.setdefault(path.rpartition(".")[2], []).append(path)
    return places


def _paths(path: str, schema: Mapping[str, Any]) -> Iterator[str]:
    for name, child in schema.get("properties", {}).items():
        yield f"{path}.{name}"
        yield from _paths(f"{path}.{name}", child)
