"""Jobs and YAML documents survive writing and reading."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given, settings

from finetune_operator.api import yaml_text
from finetune_operator.api.validate import parse_job
from tests.api.manifests import SMALLEST, Document, patched
from tests.api.random_jobs import valid_documents


@settings(deadline=None)
@given(valid_documents())
def test_job_survives_yaml(document: Document) -> None:
    job = parse_job(document)
    written = yaml_text.dump(job.model_dump(mode="json", by_alias=True, exclude_none=True))
    assert parse_job(yaml_text.load(written)) == job


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("1.5e+3", 1500.0),
        (".5", 0.5),
        ("-3", -3),
        ("0x10", 16),
        ("200", 200),
        ("1:30", "1:30"),
        ("2026-01-02", "2026-01-02"),
        ("1e", "1e"),
        ("1_000", 1000),
        ("fp16", "fp16"),
        ("yes", True),
        ("null", None),
        ("'1e-4'", "1e-4"),
    ],
)
def test_scalars_are_read_as_kubectl_reads_them(text: str, value: Any) -> None:
    read = yaml_text.load(text)
    assert read == value
    assert type(read) is type(value)
    assert yaml_text.load(yaml_text.dump(value)) == value


def test_learning_rate_in_scientific_notation_is_a_number() -> None:
    text = yaml_text.dump(SMALLEST).replace("steps: 200", "steps: 200\n    learningRate: 1e-4")
    assert parse_job(yaml_text.load(text)).spec.training.learning_rate == 1e-4


def test_duplicate_key_is_refused_with_its_line() -> None:
    with pytest.raises(yaml.YAMLError, match=r"(?s)duplicate key 'steps'.*line 3"):
        yaml_text.load("spec:\n  steps: 1\n  steps: 2\n")


def test_empty_documents_are_skipped() -> None:
    assert list(yaml_text.load_all("---\na: 1\n---\n---\nb: 2\n")) == [{"a": 1}, {"b": 2}]


def test_equal_parts_are_written_without_anchors() -> None:
    part = {"a": [1]}
    assert yaml_text.dump({"x": part, "y": part}) == "x:\n  a:\n    - 1\ny:\n  a:\n    - 1\n"


def test_patching_does_not_modify_the_original() -> None:
    patched(SMALLEST, {"spec.training.steps": 1})
    assert SMALLEST["spec"]["training"]["steps"] == 200
