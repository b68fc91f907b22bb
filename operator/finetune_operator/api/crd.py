"""Generates the CustomResourceDefinition from the FineTuneJob models.

Pydantic writes JSON schema; the API server accepts structural schemas only: no references, no unions, no null, no
titles, and exclusive bounds as a bound with a boolean. The rewriter supports the keywords that our models use and
refuses all others, so that nothing is dropped silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from finetune_operator.api import yaml_text
from finetune_operator.api.job import GROUP, KIND, PLURAL, SHORT_NAME, SINGULAR, VERSION, FineTuneJob
from finetune_operator.api.rules import combined
from finetune_operator.api.rules.rule import FieldErrorReason, Rule
from finetune_operator.api.rules.spec import RULES

Schema = dict[str, Any]

NAME = f"{PLURAL}.{GROUP}"
"""Name of the CustomResourceDefinition."""
FILE = f"crds/{GROUP}_{PLURAL}.yaml"
"""Path of the committed file, relative to the repository."""
HEADER = "# Generated from the models in operator/finetune_operator/api by `make generate`. Do not edit.\n"

_BOUNDS = ("minLength", "maxLength", "minItems", "maxItems", "maxProperties", "minimum", "maximum", "multipleOf")
_KNOWN = {
    *_BOUNDS,
    *("$ref", "$defs", "title", "description", "default", "type", "enum", "const", "format", "anyOf"),
    *("exclusiveMinimum", "exclusiveMaximum", "properties", "required", "items", "additionalProperties"),
}

COLUMNS = (
    ("Method", "string", ".spec.training.method", "Fine-tuning method", 0),
    ("Phase", "string", ".status.phase", "Phase of the job", 0),
    ("Step", "integer", ".status.step", "Completed optimizer steps", 0),
    ("Progress", "string", ".status.progress", "Completed share of the steps", 0),
    ("ETA", "string", ".status.eta", "Estimated time left", 0),
    ("Checkpoint", "date", ".status.lastCheckpoint.time", "Age of the newest verified checkpoint", 0),
    ("Nodes", "string", ".status.nodes", "Running pods / requested pods", 0),
    ("Preemptions", "integer", ".status.preemptions", "Attempts ended by a loss of capacity", 0),
    ("Failures", "integer", ".status.failures", "Attempts ended by an error of the program", 0),
    ("Age", "date", ".metadata.creationTimestamp", "Time since the job was created", 0),
    ("Loss", "number", ".status.loss", "Smoothed training loss", 1),
    ("Images/s", "number", ".status.imagesPerSecond", "Images per second, of all ranks together", 1),
    ("Goodput", "number", ".status.goodput", "Share of the time spent on steps that were kept", 1),
    ("Reason", "string", ".status.reason", "Reason of the phase; docs/troubleshooting.md explains each", 1),
    ("Message", "string", ".status.message", "Explanation of the phase", 1),
)
"""Name, type, JSON path, description and priority of kubectl's columns; those of priority 1 need -o wide."""


class SchemaError(Exception):
    """The models use a feature that structural schemas lack, or a field has no description."""


def custom_resource_definition() -> Schema:
    """Return the complete definition in Kubernetes' form."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": NAME},
        "spec": {
            "group": GROUP,
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": SINGULAR,
                "shortNames": [SHORT_NAME],
                "categories": ["all"],
            },
            "scope": "Namespaced",
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [_column(*column) for column in COLUMNS],
                    "schema": {"openAPIV3Schema": job_schema()},
                }
            ],
        },
    }


def render() -> str:
    """Return the text of the committed file."""
    return HEADER + yaml_text.dump(custom_resource_definition())


@cache
def job_schema() -> Schema:
    """Return the structural schema of a FineTuneJob, with its rules. The object is shared: do not modify it."""
    raw = FineTuneJob.model_json_schema(by_alias=True)
    # Kubernetes has its own schema for metadata and accepts no other, not even a description. Repeating its bound on
    # names keeps the estimated cost of our rules on them low.
    metadata = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 253}}}
    schema = {
        "description": raw["description"],
        "type": "object",
        "properties": {
            name: metadata if name == "metadata" else structural(field, raw["$defs"], name)
            for name, field in raw["properties"].items()
        },
        "required": ["spec"],
    }
    for name in ("apiVersion", "kind", "status"):
        # The API server must not add values that the operator did not write.
        _drop_defaults(schema["properties"][name])
    # Only the operator writes it, always as a whole: a list of its fields in each object would be longer than itself.
    schema["properties"]["status"]["x-kubernetes-map-type"] = "atomic"
    for rule in RULES:
        if not combined.is_combined(rule):
            _add_rule(schema, rule)
    for together in combined.combine(RULES):
        entry = _add_entry(schema, together.cel, combined.FALLBACK, together.reason, combined.FIELD)
        entry["messageExpression"] = together.message
    return schema


def find(path: str) -> Schema:
    """Return the part of the schema at a path, e.g. 'spec.outputs[].to'.

    Raises:
        KeyError: no such field exists.
    """
    return _find(job_schema(), path)


def _find(schema: Schema, path: str) -> Schema:
    for name in path.split(".") if path else ():
        fields = schema.get("properties", {})
        schema = fields[name.removesuffix("[]")] if fields else schema["additionalProperties"]
        if name.endswith("[]"):
            schema = schema["items"]
    return schema


def _column(name: str, kind: str, path: str, description: str, priority: int) -> Schema:
    column: Schema = {"name": name, "type": kind, "jsonPath": path, "description": description}
    return column | {"priority": priority} if priority else column


def _add_rule(schema: Schema, rule: Rule[Any]) -> None:
    path, field = ("", rule.path) if rule.scope.at_root else (rule.scope.path, rule.field)
    _add_entry(_find(schema, path), rule.cel, rule.message, rule.reason, field)


def _add_entry(node: Schema, cel: str, message: str, reason: FieldErrorReason, field: str) -> Schema:
    entry: Schema = {"rule": cel, "message": message}
    if reason is not FieldErrorReason.INVALID:
        entry["reason"] = reason.value
    if field:
        entry["fieldPath"] = f".{field}"
    node.setdefault("x-kubernetes-validations", []).append(entry)
    return entry


def _drop_defaults(schema: Schema) -> None:
    schema.pop("default", None)
    for child in schema.get("properties", {}).values():
        _drop_defaults(child)
    if "items" in schema:
        _drop_defaults(schema["items"])


def structural(raw: Mapping[str, Any], definitions: Mapping[str, Schema], path: str) -> Schema:
    """Rewrite one node of a JSON schema, and all nodes below it, as a structural schema.

    Raises:
        SchemaError: structural schemas have no such feature, or a field has no description.
    """
    node = _resolve(raw, definitions)
    if unknown := {key for key in node if key not in _KNOWN and not key.startswith("x-kubernetes-")}:
        raise SchemaError(f"{path}: a structural schema has no {', '.join(sorted(unknown))}")
    schema: Schema = {"description": node["description"]} if "description" in node else {}
    if _is_int_or_string(node):
        return schema | {"x-kubernetes-int-or-string": True}
    if "type" in node:
        schema["type"] = node["type"]
    elif not node.get("x-kubernetes-preserve-unknown-fields"):
        raise SchemaError(f"{path}: has no type")
    schema |= {key: node[key] for key in ("format", "enum") if key in node}
    if "const" in node:
        schema["enum"] = [node["const"]]
    schema |= _bounds(node)
    if node.get("default") is not None:
        schema["default"] = _without_null(node["default"])
    schema |= _children(node, definitions, path)
    return schema | {key: value for key, value in node.items() if key.startswith("x-kubernetes-")}


def _resolve(raw: Mapping[str, Any], definitions: Mapping[str, Schema]) -> Schema:
    """Inline the target of a reference, or the one branch that is not null. Keys next to it take precedence."""
    node = dict(raw)
    if "$ref" in node:
        target = definitions[node.pop("$ref").removeprefix("#/$defs/")]
        return _resolve({**target, **node}, definitions)
    branches = [branch for branch in node.get("anyOf", ()) if branch.get("type") != "null"]
    if len(branches) == 1:
        del node["anyOf"]
        return _resolve({**branches[0], **node}, definitions)
    return node


def _is_int_or_string(node: Mapping[str, Any]) -> bool:
    return {branch.get("type") for branch in node.get("anyOf", ())} == {"integer", "string"}


def _bounds(node: Mapping[str, Any]) -> Schema:
    bounds = {key: node[key] for key in _BOUNDS if key in node}
    for side in ("Minimum", "Maximum"):
        if f"exclusive{side}" in node:
            bounds[side.lower()] = node[f"exclusive{side}"]
            bounds[f"exclusive{side}"] = True
    return bounds


def _without_null(default: object) -> object:
    """Return a default without nulls. It must be complete: rules run before the defaults of its fields are set."""
    if isinstance(default, Mapping):
        return {name: _without_null(value) for name, value in default.items() if value is not None}
    return default


def _children(node: Mapping[str, Any], definitions: Mapping[str, Schema], path: str) -> Schema:
    if node.get("type") == "array":
        return {"items": structural(node["items"], definitions, f"{path}[]"), "x-kubernetes-list-type": "atomic"}
    if node.get("type") != "object":
        return {}
    if "properties" in node:
        properties = {
            name: structural(child, definitions, f"{path}.{name}") for name, child in node["properties"].items()
        }
        for name, child in properties.items():
            if not child.get("description"):
                raise SchemaError(f"{path}.{name}: has no description")
        return {"properties": properties} | ({"required": node["required"]} if "required" in node else {})
    if node.get("additionalProperties") is True:
        return {"x-kubernetes-preserve-unknown-fields": True}
    if "additionalProperties" not in node:
        return {}
    return {"additionalProperties": structural(node["additionalProperties"], definitions, f"{path}.*")}
