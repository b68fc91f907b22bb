"""Generates the API reference in Markdown: every field, rule, method, condition and reason."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic.alias_generators import to_camel

from finetune_contract.methods import METHODS
from finetune_operator.api import conditions, crd, reasons
from finetune_operator.api.job import API_VERSION, KIND, SHORT_NAME
from finetune_operator.api.rules import edits
from finetune_operator.api.rules.spec import RULES

JOB_FILE = "docs/reference/finetunejob.md"
REASONS_FILE = "docs/reference/reasons.md"
HEADER = "<!-- Generated from operator/finetune_operator/api by `make generate`. Do not edit. -->\n"

Schema = Mapping[str, Any]
_COMPARISONS = (("minimum", "exclusiveMinimum", "≥", ">"), ("maximum", "exclusiveMaximum", "≤", "<"))
_LENGTHS = (
    ("minLength", "maxLength", "characters"),
    ("minItems", "maxItems", "items"),
    ("", "maxProperties", "entries"),
)


def render_job() -> str:
    """Return the reference of all fields, methods and rules."""
    lines = [
        HEADER,
        f"# {KIND}",
        "",
        f"`{API_VERSION}`, short name `{SHORT_NAME}`. `kubectl apply` and `finetune run` refuse unknown fields and "
        "values that break a rule, with the same messages.",
        "",
        "A field that is neither required nor has a default is optional. Durations are written as `90s`, `10m` or "
        "`1h30m`.",
    ]
    for root in ("spec", "status"):
        for path, schema in _objects(root, crd.find(root)):
            lines += ["", f"## {path}", "", f"{_sentence(schema['description'])}", "", *_fields(schema)]
    lines += _methods()
    lines += ["", "## Rules", "", "| field | problem, and what to write instead |", "|-|-|"]
    lines += [f"| `{rule.path}` | {_cell(rule.message)} |" for rule in RULES]
    return "\n".join([*lines, *_edits()]) + "\n"


def render_reasons() -> str:
    """Return the reference of all conditions and reasons."""
    lines = [
        HEADER,
        "# Conditions and reasons",
        "",
        "Conditions and reasons shown by `kubectl describe ftj`, and by `finetune describe` for jobs of this machine, "
        "and how to react.",
        "",
        "## Conditions",
        "",
        "| condition | meaning if True |",
        "|-|-|",
        *(f"| `{condition}` | {_cell(meaning)} |" for condition, meaning in conditions.CONDITIONS.items()),
    ]
    for topic in reasons.Topic:
        rows = {reason: doc for reason, doc in reasons.REASONS.items() if doc.topic is topic}
        lines += ["", f"## {topic}", "", "| reason | meaning | what to do | counts as |", "|-|-|-|-|"]
        lines += [
            f"| `{reason}` | {_cell(doc.meaning)} | {_cell(doc.remedy)} | {_counts(doc)} |"
            for reason, doc in rows.items()
        ]
    return "\n".join(lines) + "\n"


def _methods() -> list[str]:
    """Return the table of methods, from the traits that the rules and the trainer read, too."""
    return [
        "",
        "## Methods",
        "",
        "| method | settings | output formats | captions | conditioning images | sharding |",
        "|-|-|-|-|-|-|",
        *(
            f"| `{method}` | {_names(map(to_camel, traits.settings))} | {_names(sorted(traits.formats))} "
            f"| {_needed(traits.needs_captions)} | {_needed(traits.needs_conditioning)} "
            f"| {'supported' if traits.shardable else 'not supported'} |"
            for method, traits in METHODS.items()
        ),
    ]


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _needed(needed: bool) -> str:
    return "required" if needed else "not required"


def _edits() -> list[str]:
    return [
        "",
        "## Edits",
        "",
        "Before the first attempt begins, every field of a job except `managedBy` may change. After that, the fields "
        "that the trainer and its checkpoints depend on are fixed; `kubectl apply` and `finetune run` refuse to change "
        "them.",
        "",
        "| field | problem, and what to do instead |",
        "|-|-|",
        *(f"| `{fixed.path}` | {_cell(fixed.message)} |" for fixed in edits.FIXED),
        "",
        "All other fields may change at any time, and the length and the outputs as the table above says. To apply a "
        "change immediately that takes effect with the next attempt, suspend the job and resume it.",
        "",
        "| field | takes effect |",
        "|-|-|",
        *(f"| `{path}` | {when} |" for path, when in (edits.LIMITED | edits.CHANGEABLE).items()),
    ]


def _counts(doc: reasons.ReasonDoc) -> str:
    counted = str(doc.counts_as) if doc.counts_as else ""
    return f"{counted}, final" if doc.final else counted


def _objects(path: str, schema: Schema) -> Iterator[tuple[str, Schema]]:
    """Yield an object and all objects below it, outer before inner."""
    yield path, schema
    for name, child in schema["properties"].items():
        below = child.get("items", child)
        if "properties" in below:
            inner = {"description": child["description"], **below}
            yield from _objects(f"{path}.{name}{'[]' if child is not below else ''}", inner)


def _fields(schema: Schema) -> Iterator[str]:
    yield "| field | type | default | bounds | meaning |"
    yield "|-|-|-|-|-|"
    required = schema.get("required", ())
    for name, field in schema["properties"].items():
        default = "**required**" if name in required else _default(field)
        yield f"| `{name}` | {_type(field)} | {default} | {_bounds(field)} | {_cell(field['description'])} |"


def _type(field: Schema) -> str:
    if "enum" in field:
        return " \\| ".join(f"`{json.dumps(value) if isinstance(value, bool) else value}`" for value in field["enum"])
    if field.get("x-kubernetes-int-or-string"):
        return "integer or string"
    if "type" not in field:
        return "map or list"
    if field["type"] == "array":
        return f"list of {_type(field['items'])}"
    if "additionalProperties" in field:
        return f"map of {_type(field['additionalProperties'])}"
    return "time" if field.get("format") == "date-time" else str(field["type"])


def _default(field: Schema) -> str:
    """Return the default to show; the default of an object is shown by its fields."""
    default = field.get("default")
    if default is None or default in ([], {}) or field.get("type") == "object":
        return ""
    if isinstance(default, list):
        return ", ".join(f"`{item}`" for item in default)
    if isinstance(default, float) and "e" in (text := repr(default)) and "." not in text:
        # YAML 1.1 reads 1e-08 as text.
        return f"`{text.replace('e', '.0e')}`"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _bounds(field: Schema) -> str:
    bounds = [
        f"{outside if field.get(exclusive) else within} {field[key]}"
        for key, exclusive, within, outside in _COMPARISONS
        if key in field
    ]
    if "multipleOf" in field:
        bounds.append(f"multiple of {field['multipleOf']}")
    for least, most, unit in _LENGTHS:
        if most in field:
            bounds.append(f"{f'{field[least]} to' if least in field else 'up to'} {field[most]} {unit}")
    return ", ".join(bounds)


def _sentence(text: str) -> str:
    """Return a description as a complete sentence."""
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _cell(text: str) -> str:
    """Escape text for a table cell."""
    return text.replace("|", "\\|").replace("<", "&lt;")
