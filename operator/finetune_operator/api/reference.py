"""The reference of the API for people, as Markdown: every field and rule, and every reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

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
    """Write the reference of all fields and rules."""
    lines = [
        HEADER,
        f"# {KIND}",
        "",
        f"`{API_VERSION}`, short name `{SHORT_NAME}`. Unknown fields are refused, and so is what breaks a rule, by "
        "`kubectl apply` and by `finetune run` with the same sentences.",
        "",
        "A field without a default that is not required is left out when it is not needed. A length of time is written "
        "as `90s`, `10m` or `1h30m`.",
    ]
    for root in ("spec", "status"):
        for path, schema in _objects(root, crd.find(root)):
            lines += ["", f"## {path}", "", f"{_sentence(schema['description'])}", "", *_fields(schema)]
    lines += ["", "## Rules", "", "| field | what is refused, and what to write instead |", "|-|-|"]
    lines += [f"| `{rule.path}` | {_cell(rule.sentence)} |" for rule in RULES]
    return "\n".join([*lines, *_edits()]) + "\n"


def render_reasons() -> str:
    """Write the reference of all conditions and reasons."""
    lines = [
        HEADER,
        "# Conditions and reasons",
        "",
        "What `kubectl describe ftj` and `finetune describe` show, and what to do about it.",
        "",
        "## Conditions",
        "",
        "| condition | True means |",
        "|-|-|",
        *(f"| `{condition}` | {_cell(meaning)} |" for condition, meaning in conditions.CONDITIONS.items()),
    ]
    for topic in reasons.Topic:
        rows = {reason: doc for reason, doc in reasons.REASONS.items() if doc.topic is topic}
        lines += ["", f"## {topic}", "", "| reason | meaning | what to do | counts as |", "|-|-|-|-|"]
        lines += [
            f"| `{reason}` | {_cell(doc.meaning)} | {_cell(doc.do)} | {_counts(doc)} |" for reason, doc in rows.items()
        ]
    return "\n".join(lines) + "\n"


def _edits() -> list[str]:
    return [
        "",
        "## Edits",
        "",
        "Before its first attempt begins, all of a job but `managedBy` may change. From then on what the trainer and "
        "its checkpoints depend on stays; `kubectl apply` and `finetune run` refuse to change it.",
        "",
        "| field | what is refused, and what to do instead |",
        "|-|-|",
        *(f"| `{fixed.path}` | {_cell(fixed.sentence)} |" for fixed in edits.FIXED),
        "",
        "The rest may change at any time. To have a change at once that takes effect with the next attempt, suspend "
        "the job and resume it.",
        "",
        "| field | takes effect |",
        "|-|-|",
        *(f"| `{path}` | {when} |" for path, when in edits.CHANGEABLE.items()),
    ]


def _counts(doc: reasons.ReasonDoc) -> str:
    counted = str(doc.counts_as) if doc.counts_as else ""
    return f"{counted}, final" if doc.final else counted


def _objects(path: str, schema: Schema) -> Iterator[tuple[str, Schema]]:
    """An object and all objects below it, outer before inner."""
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
        return " \\| ".join(f"`{value}`" for value in field["enum"])
    if field.get("x-kubernetes-int-or-string"):
        return "integer or string"
    if field["type"] == "array":
        return f"list of {_type(field['items'])}"
    if "additionalProperties" in field:
        return f"map of {_type(field['additionalProperties'])}"
    return "time" if field.get("format") == "date-time" else str(field["type"])


def _default(field: Schema) -> str:
    """A default that is worth showing: that of an object stands with its fields."""
    default = field.get("default")
    if default is None or default in ([], {}) or field["type"] == "object":
        return ""
    if isinstance(default, list):
        return ", ".join(f"`{item}`" for item in default)
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
    """A description as a sentence of its own."""
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _cell(text: str) -> str:
    """Text for a cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;")
