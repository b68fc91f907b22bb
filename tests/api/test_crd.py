"""The CRD is a structural schema, and the committed files match the models."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from finetune_contract.spec_model import SpecModel
from finetune_operator.api import crd, yaml_text
from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.names import MAX_JOB_NAME
from finetune_operator.api.rules import combined
from finetune_operator.api.rules.rule import FieldErrorReason
from finetune_operator.api.rules.spec import RULES
from tests.api.manifests import FULL
from tools import generate

FORBIDDEN = {"$ref", "$defs", "anyOf", "allOf", "oneOf", "not", "title", "const", "nullable"}
TYPES = {"object", "array", "string", "integer", "number", "boolean"}


def nodes(path: str, schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(f"{path}.{name}", child)
    for key in ("items", "additionalProperties"):
        if key in schema:
            yield from nodes(f"{path}.{key}", schema[key])


NODES = dict(nodes("", crd.job_schema()))


def test_every_node_is_structural() -> None:
    for path, node in NODES.items():
        assert not FORBIDDEN & set(node), path
        has_own_type = node.get("x-kubernetes-int-or-string") or node.get("x-kubernetes-preserve-unknown-fields")
        assert node.get("type") in TYPES or has_own_type, path


def test_every_field_is_described() -> None:
    fields = {path: node for path, node in NODES.items() if not path.endswith(("items", "additionalProperties"))}
    assert not [path for path, node in fields.items() if not node.get("description") and "metadata" not in path]


def test_exclusive_bounds_are_a_bound_and_a_boolean() -> None:
    rate = crd.find("spec.training.learningRate")
    assert (rate["minimum"], rate["exclusiveMinimum"], rate["maximum"]) == (0, True, 10)
    assert "exclusiveMaximum" not in rate


def test_every_string_and_list_of_the_spec_is_bounded() -> None:
    for path, node in nodes("spec", crd.find("spec")):
        if node.get("type") == "string":
            assert "maxLength" in node or "enum" in node, path
        if node.get("type") == "array":
            assert "maxItems" in node, path
        if "additionalProperties" in node:
            assert "maxProperties" in node, path


def test_spec_has_the_defaults_of_the_models_and_status_has_none() -> None:
    assert crd.find("spec.training.batchSize")["default"] == 1
    assert crd.find("spec.topology")["default"] == {
        "accelerator": "gpu",
        "processesPerNode": 1,
        "cpu": {"backend": "auto", "ipex": "auto", "ranksPer": "numa", "allocator": "auto"},
    }
    assert not [path for path, node in nodes("status", crd.find("status")) if "default" in node]


def test_maps_and_free_form_parts() -> None:
    resources = crd.find("spec.topology.resources")
    assert resources["additionalProperties"] == {"x-kubernetes-int-or-string": True}
    template = crd.find("spec.podTemplate")
    assert (template["type"], template["x-kubernetes-preserve-unknown-fields"]) == ("object", True)
    assert "properties" not in template
    conditions = crd.find("status.conditions")
    assert (conditions["x-kubernetes-list-type"], conditions["x-kubernetes-list-map-keys"]) == ("map", ["type"])
    # In a list with keys, the API server compares each item with the old one, at every write of the status.
    assert crd.find("status.attempts")["x-kubernetes-list-type"] == "atomic"
    assert crd.find("status.startTime")["format"] == "date-time"


def test_columns() -> None:
    names = [name.upper() for name, _, _, _, priority in crd.COLUMNS if not priority]
    assert " ".join(names) == "METHOD PHASE STEP PROGRESS ETA CHECKPOINT NODES PREEMPTIONS FAILURES AGE"
    wide = [name for name, _, _, _, priority in crd.COLUMNS if priority]
    assert wide == ["Loss", "Images/s", "Goodput", "Reason", "Message"]


@pytest.mark.parametrize("path", [path for _, _, path, _, _ in crd.COLUMNS if not path.startswith(".metadata")])
def test_columns_show_existing_fields(path: str) -> None:
    assert crd.find(path.removeprefix("."))


def test_names() -> None:
    spec = crd.custom_resource_definition()["spec"]
    assert spec["names"]["shortNames"] == ["ftj"]
    assert spec["names"]["categories"] == ["all"]
    assert spec["versions"][0]["subresources"] == {"status": {}}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.path}: {rule.message[:30]}")
def test_rule_names_an_existing_field_and_gives_advice(rule: Any) -> None:
    assert crd.find(rule.path)
    assert "write" in rule.message or "leave" in rule.message
    assert "\n" not in rule.message
    assert rule.path.removesuffix("[]").rpartition(".")[2] in rule.message
    if combined.is_combined(rule):
        text = json.dumps(f"{rule.path}: {rule.message}. ")
        found = [entry for entry in root_rules() if text in entry.get("messageExpression", "")]
        # One for jobs without a status, and one for edits.
        assert len(found) == 2
    else:
        place = "" if rule.scope.at_root else rule.scope.path
        found = [entry for entry in crd.find(place)["x-kubernetes-validations"] if entry["message"] == rule.message]
        assert [entry["rule"] for entry in found] == [rule.cel]
    assert {entry.get("reason", FieldErrorReason.INVALID) for entry in found} == {rule.reason}


def root_rules() -> list[dict[str, Any]]:
    """Return the rules of the complete job."""
    rules: list[dict[str, Any]] = crd.find("")["x-kubernetes-validations"]
    return rules


def test_writes_of_the_status_are_recognized_before_the_spec_is_read() -> None:
    """Reading the fields of the spec would cost the API server more than the rest of such a write."""
    writes = "self.?status.?writes != oldSelf.?status.?writes || "
    prefixes = (writes, "has(self.status) || ", f"!has(self.status) || {writes}")
    rules = [entry["rule"] for entry in root_rules() if "self.spec" in entry["rule"]]
    assert {next(prefix for prefix in prefixes if rule.startswith(prefix)) for rule in rules} == set(prefixes)


def test_large_objects_have_no_rules_of_their_own() -> None:
    for path in combined.PARTS:
        assert "x-kubernetes-validations" not in crd.find(path)


def test_limit_on_job_names_is_derived_from_the_longest_child() -> None:
    assert any(f"<= {MAX_JOB_NAME}" in rule.cel for rule in RULES)


class Colour(StrEnum):
    """A colour."""

    RED = "red"


class Inner(SpecModel):
    """An inner part."""

    colour: Colour = Field(default=Colour.RED, description="a colour")


class Undescribed(SpecModel):
    """A part with a field without a description."""

    size: int = 1


class Union(SpecModel):
    """A part with a field of two types."""

    size: int | bool = Field(default=1, description="a size")


class Exotic(SpecModel):
    """A part with a pattern, which must be a rule instead."""

    size: str = Field(default="1", description="a size", pattern="^[0-9]$")


@pytest.mark.parametrize(
    ("model", "message"), [(Undescribed, "no description"), (Union, "anyOf|no type"), (Exotic, "has no pattern")]
)
def test_unsupported_schema_features_are_refused(model: type[SpecModel], message: str) -> None:
    raw = model.model_json_schema()
    with pytest.raises(crd.SchemaError, match=message):
        crd.structural(raw, raw.get("$defs", {}), model.__name__)


def test_references_are_inlined_and_keys_next_to_them_take_precedence() -> None:
    class Outer(SpecModel):
        """An outer part."""

        inner: Inner | None = Field(default=None, description="purpose in the outer part")

    raw = Outer.model_json_schema()
    assert crd.structural(raw, raw["$defs"], "Outer")["properties"] == {
        "inner": {
            "description": "purpose in the outer part",
            "type": "object",
            "properties": {"colour": {"description": "a colour", "type": "string", "enum": ["red"], "default": "red"}},
        }
    }


def test_rendered_definition_is_read_back_unchanged() -> None:
    assert yaml_text.load(crd.render()) == crd.custom_resource_definition()


def test_full_manifest_uses_every_field_of_the_spec() -> None:
    """A test with the full manifest covers all fields."""
    given = FineTuneJob.model_validate(FULL).spec.model_dump(by_alias=True, exclude_unset=True)
    # Fields that exclude a field of the manifest.
    others = {
        *("training.steps", "training.script", "training.textualInversion", "training.controlnet"),
        *("topology.nodes", "topology.cpu", "checkpoint.storage.hostPath", "checkpoint.storage.nfs"),
        *("checkpoint.storage.bucket", "dataset.shuffleTags"),
        *("training.validation.images", "training.validation.epochs", "training.lrPower"),
        *("training.textEncoderLearningRate", "model.image"),
        *("checkpoint.interval.steps", "checkpoint.from"),
    }
    assert set(missing("", crd.find("spec"), given)) == others


def missing(path: str, schema: dict[str, Any], value: dict[str, Any]) -> Iterator[str]:
    for name, field in schema["properties"].items():
        below = f"{path}.{name}".removeprefix(".")
        if name not in value:
            yield below
        elif "properties" in field:
            yield from missing(below, field, value[name])


def test_committed_files_are_up_to_date() -> None:
    assert generate.differences(generate.ROOT) == ""


def test_difference_is_shown_and_fixed(tmp_path: Path) -> None:
    generate.write(tmp_path)
    path = tmp_path / crd.FILE
    path.write_text(path.read_text().replace("- ftj", "- job"))
    difference = generate.differences(tmp_path)
    assert f"--- {crd.FILE}" in difference
    assert "-      - job" in difference
    assert "+      - ftj" in difference
    generate.write(tmp_path)
    assert generate.differences(tmp_path) == ""


def test_check_command_succeeds() -> None:
    command = [sys.executable, str(generate.ROOT / "tools/generate.py"), "--check"]
    assert subprocess.run(command, check=False, capture_output=True, timeout=60).returncode == 0
