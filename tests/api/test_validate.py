"""Every way of being wrong is told with its field and what to write instead; all of them at once."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_contract.spec import Method
from finetune_operator.api.job import Accelerator, FineTuneJob
from finetune_operator.api.rules.spec import RULES
from finetune_operator.api.validate import InvalidJob, Problem, broken_rules, parse_job
from tests.api.bad_manifests import BAD, Bad
from tests.api.manifests import FULL, GOOD, SMALLEST, Document, patched


def problems(document: object) -> tuple[Problem, ...]:
    with pytest.raises(InvalidJob) as caught:
        parse_job(document)
    return caught.value.problems


@pytest.mark.parametrize("document", GOOD.values(), ids=GOOD.keys())
def test_a_good_manifest_is_read(document: Document) -> None:
    job = parse_job(document)
    assert job.metadata.name == document["metadata"]["name"]
    assert broken_rules(job) == []


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_a_bad_manifest_is_refused_with_its_field_and_what_to_write(bad: Bad) -> None:
    found = problems(bad.document)
    assert [problem.field for problem in found] == [bad.field]
    assert bad.words in found[0].sentence
    assert str(found[0]) == f"{bad.field}: {found[0].sentence}"


def test_the_table_of_bad_manifests_breaks_every_rule() -> None:
    told = {problem.sentence for bad in BAD for problem in problems(bad.document)}
    assert {rule.sentence for rule in RULES} - told == set()


def test_all_problems_are_told_at_once() -> None:
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
def test_what_is_no_mapping_is_refused(document: object) -> None:
    (problem,) = problems(document)
    assert "write apiVersion, kind, metadata and spec" in str(problem)


def test_the_fields_of_another_kind_are_not_judged() -> None:
    fields = [problem.field for problem in problems({"kind": "Pod", "apiVersion": "v1", "spec": {"containers": []}})]
    assert fields == ["apiVersion", "kind"]


def test_the_source_stands_before_every_sentence() -> None:
    with pytest.raises(InvalidJob) as caught:
        parse_job(patched(SMALLEST, {"spec.training.steps": 0, "spec.model.base": ""}), source="job.yaml")
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert lines == caught.value.sentences
    assert all(line.startswith("job.yaml: spec.") for line in lines)


@pytest.mark.parametrize("names", ["batch_size", "batchSize"])
def test_python_names_are_not_read_where_the_api_server_would_not_read_them(names: str) -> None:
    document = patched(SMALLEST, {f"spec.training.{names}": 2})
    if names == "batchSize":
        assert parse_job(document).spec.training.batch_size == 2
    else:
        assert problems(document)


def test_defaults_are_filled() -> None:
    spec = parse_job(SMALLEST).spec
    assert spec.training.method is Method.LORA
    assert (spec.training.batch_size, spec.training.learning_rate) == (1, 1e-4)
    assert (spec.topology.accelerator, spec.topology.nodes) == (Accelerator.GPU, None)
    assert spec.checkpoint.keep == 3


def test_what_the_api_server_adds_is_no_obstacle() -> None:
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


def test_a_stored_job_that_breaks_a_rule_is_found_out() -> None:
    job = FineTuneJob.model_validate(patched(SMALLEST, {"spec.training.epochs": 3}))
    assert [problem.field for problem in broken_rules(job)] == ["spec.training.epochs"]


def test_long_values_are_cut_in_sentences() -> None:
    (problem,) = problems(patched(SMALLEST, {"spec.training.steps": "x" * 5000}))
    assert len(problem.sentence) < 300


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        ({"spec.trainng": {}}, "write training"),
        ({"spec.training.lr": 1}, "write spec.training.learningRate"),
        ({"spec.training.train_batch_size": 1}, "write batchSize"),
        ({"spec.learningRate": 1}, "write spec.training.learningRate"),
        ({"spec.training.keep": 1}, "write spec.checkpoint.keep"),
        ({"spec.training.lora.r": 1}, "known here are rank, alpha, dropout, targetModules"),
    ],
)
def test_an_unknown_field_gets_the_best_guess(patch: dict[str, Any], words: str) -> None:
    (problem,) = problems(patched(SMALLEST, patch))
    assert problem.sentence.startswith("unknown field")
    assert words in problem.sentence
