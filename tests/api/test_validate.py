"""`parse_job` reports every problem of a manifest, with its field and what to write instead."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from pydantic import ValidationError

from finetune_contract.spec import Method
from finetune_operator.api.job import Accelerator, FineTuneJob
from finetune_operator.api.rules.spec import RULES
from finetune_operator.api.validate import InvalidJob, Problem, broken_rules, parse_job
from tests.api.bad_manifest import BadManifest
from tests.api.bad_manifests import BAD
from tests.api.manifests import FULL, GOOD, SMALLEST, Document, patched


def problems(document: object) -> tuple[Problem, ...]:
    with pytest.raises(InvalidJob) as caught:
        parse_job(document)
    return caught.value.problems


@pytest.mark.parametrize("document", GOOD.values(), ids=GOOD.keys())
def test_valid_manifests_are_parsed(document: Document) -> None:
    job = parse_job(document)
    assert job.metadata.name == document["metadata"]["name"]
    assert broken_rules(job) == []


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_invalid_manifests_are_refused_with_field_and_advice(bad: BadManifest) -> None:
    found = problems(bad.document)
    assert [problem.field for problem in found] == [bad.field]
    assert bad.message in found[0].message
    assert str(found[0]) == f"{bad.field}: {found[0].message}"


def test_bad_manifests_break_every_rule() -> None:
    reported = {problem.message for bad in BAD for problem in problems(bad.document)}
    assert {rule.message for rule in RULES} - reported == set()


def test_all_problems_are_reported_together() -> None:
    document = patched(
        SMALLEST,
        {
            "metadata.name": "Circles",
            "spec.training.batch_size": 2,
            "spec.training.method": "lora",
            "spec.topology": {"minNodes": 3},
            "spec.recovery.hangTimeout": "soon",
            "spec.outputs": [{"format": "webui", "to": "a"}, {"format": "zip"}],
        },
    )
    assert sorted(problem.field for problem in problems(document)) == [
        "metadata.name",
        "spec.outputs[1].format",
        "spec.outputs[1].to",
        "spec.recovery.hangTimeout",
        "spec.topology.maxNodes",
        "spec.training.batch_size",
        "spec.training.method",
    ]


@pytest.mark.parametrize("document", [None, [], [SMALLEST], "kind: FineTuneJob", 3])
def test_document_that_is_not_a_mapping_is_refused(document: object) -> None:
    (problem,) = problems(document)
    assert "write apiVersion, kind, metadata and spec" in str(problem)


def test_fields_of_another_kind_are_not_checked() -> None:
    fields = [problem.field for problem in problems({"kind": "Pod", "apiVersion": "v1", "spec": {"containers": []}})]
    assert fields == ["apiVersion", "kind"]


def test_source_is_the_prefix_of_every_message() -> None:
    with pytest.raises(InvalidJob) as caught:
        parse_job(patched(SMALLEST, {"spec.training.steps": 0, "spec.model.base": ""}), source="job.yaml")
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert lines == caught.value.messages
    assert all(line.startswith("job.yaml: spec.") for line in lines)


@pytest.mark.parametrize("names", ["batch_size", "batchSize"])
def test_python_field_names_are_refused(names: str) -> None:
    document = patched(SMALLEST, {f"spec.training.{names}": 2})
    if names == "batchSize":
        assert parse_job(document).spec.training.batch_size == 2
    else:
        assert problems(document)


def test_defaults_are_set() -> None:
    spec = parse_job(SMALLEST).spec
    assert spec.training.method is Method.LORA
    assert (spec.training.batch_size, spec.training.resolution) == (1, 512)
    # Their defaults depend on the method.
    assert (spec.training.learning_rate, spec.training.center_crop) == (None, None)
    assert (spec.topology.accelerator, spec.topology.nodes) == (Accelerator.GPU, None)
    assert spec.checkpoint.keep == 3


def test_fields_added_by_the_api_server_are_accepted() -> None:
    stored = patched(
        FULL,
        {
            "metadata.uid": "1f0c3a2b-0000",
            "metadata.generation": 2,
            "metadata.resourceVersion": "17",
            "metadata.creationTimestamp": "2026-01-02T03:04:05Z",
            "metadata.managedFields": [{"manager": "kubectl"}],
            "status": {"phase": "Running", "attempt": 2, "step": 40, "tally": {}, "newField": 1},
        },
    )
    job = parse_job(stored)
    assert (job.metadata.uid, job.metadata.generation, job.status.attempt) == ("1f0c3a2b-0000", 2, 2)


def test_broken_rules_of_a_stored_job_are_found() -> None:
    job = FineTuneJob.model_validate(patched(SMALLEST, {"spec.training.epochs": 3}))
    assert [problem.field for problem in broken_rules(job)] == ["spec.training.epochs"]


def test_the_same_rules_are_broken_as_stored_and_as_written() -> None:
    readable = []
    for bad in BAD:
        with contextlib.suppress(ValidationError):
            readable.append((bad, FineTuneJob.model_validate(bad.document)))
    assert len(readable) > len(BAD) / 2
    rules = {rule.message for rule in RULES}
    for bad, job in readable:
        written = [problem for problem in problems(bad.document) if problem.message in rules]
        assert broken_rules(job) == written, bad.name


def test_long_values_are_shortened_in_messages() -> None:
    (problem,) = problems(patched(SMALLEST, {"spec.training.steps": "x" * 5000}))
    assert len(problem.message) < 300


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        ({"spec.trainng": {}}, "write training"),
        ({"spec.training.lr": 1}, "write spec.training.learningRate"),
        ({"spec.training.train_batch_size": 1}, "write batchSize"),
        ({"spec.learningRate": 1}, "write spec.training.learningRate"),
        ({"spec.training.keep": 1}, "write spec.checkpoint.keep"),
        ({"spec.training.lora.r": 1}, "the fields here are rank, alpha, dropout, targetModules"),
    ],
)
def test_unknown_field_is_answered_with_the_most_similar_one(patch: dict[str, Any], message: str) -> None:
    (problem,) = problems(patched(SMALLEST, patch))
    assert problem.message.startswith("unknown field")
    assert message in problem.message
