"""Edits of a job whose first attempt has begun; every field of the spec is either fixed or changeable."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from finetune_operator.api import crd
from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.managed import is_ours
from finetune_operator.api.rules import edits
from finetune_operator.api.rules.edits import forbidden_edits, keep_earlier_defaults
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.api.validate import parse_job
from tests.api.manifests import FULL, GOOD, REMOVED, SMALLEST, Document, patched

CHANGES: dict[str, Any] = {
    "spec.model": {"spec.model.revision": "fp32"},
    "spec.dataset": {"spec.dataset.maxSamples": 2000},
    "spec.training": {"spec.training.learningRate": 1e-3},
    "spec.training.steps": {"spec.training.epochs": REMOVED, "spec.training.steps": 100_000},
    "spec.training.epochs": {"spec.training.epochs": 1},
    "spec.topology.accelerator": {
        "spec.topology.accelerator": "cpu",
        "spec.topology.gpuClaimTemplateName": REMOVED,
        "spec.training.memoryPreset": REMOVED,
        "spec.training.optimizer": "adamw",
        "spec.training.attention": "auto",
        "spec.topology.resources": {"cpu": 4, "memory": "64Gi"},
    },
    "spec.topology.nodes": {
        "spec.topology.nodes": 4,
        "spec.topology.minNodes": REMOVED,
        "spec.topology.maxNodes": REMOVED,
    },
    "spec.topology.maxNodes": {"spec.topology.maxNodes": 6},
    "spec.topology.processesPerNode": {
        "spec.topology.processesPerNode": 2,
        "spec.topology.resources": {"cpu": 4, "memory": "64Gi"},
    },
    "spec.topology.cpu": {
        "spec.topology.accelerator": "cpu",
        "spec.topology.gpuClaimTemplateName": REMOVED,
        "spec.topology.cpu.backend": "ccl",
        "spec.training.memoryPreset": REMOVED,
        "spec.training.optimizer": "adamw",
        "spec.training.attention": "auto",
        "spec.topology.resources": {"cpu": 4, "memory": "64Gi"},
    },
    "spec.checkpoint": {"spec.checkpoint.keep": 7},
    "spec.outputs": {"spec.outputs": []},
    "spec.queueName": {"spec.queueName": REMOVED},
    "spec.managedBy": {"spec.managedBy": "kueue.x-k8s.io/multikueue"},
}
"""For each fixed field an edit of FULL that changes it."""

ALLOWED: dict[str, Any] = {
    "spec.training.cudaGraphs": {"spec.training.cudaGraphs": False},
    "spec.training.compile": {"spec.training.compile": "off"},
    "spec.topology.minNodes": {"spec.topology.minNodes": 1},
    "spec.recovery.shrinkAfter": {"spec.recovery.shrinkAfter": "90s"},
    "spec.topology.resources": {"spec.topology.resources": {"memory": "128Gi"}},
    "spec.topology.pack": {"spec.topology.pack": "zone"},
    "spec.topology.gpuClaimTemplateName": {"spec.topology.gpuClaimTemplateName": "other"},
    "spec.recovery.maxMemory": {"spec.recovery.maxMemory": "256Gi"},
    "spec.recovery.maxFailures": {"spec.recovery.maxFailures": 9},
    "spec.recovery.manualRetries": {"spec.recovery.manualRetries": 2},
    "spec.recovery.spot": {"spec.recovery.spot": REMOVED},
    "spec.recovery.hangTimeout": {"spec.recovery.hangTimeout": "2h"},
    "spec.recovery.noticeSeconds": {"spec.recovery.noticeSeconds": 60},
    "spec.suspend": {"spec.suspend": False},
    "spec.scheduling": {"spec.scheduling": "auto"},
    "spec.priorityClassName": {"spec.priorityClassName": "high"},
    "spec.activeDeadlineSeconds": {"spec.activeDeadlineSeconds": REMOVED},
    "spec.ttlSecondsAfterFinished": {"spec.ttlSecondsAfterFinished": 60},
    "spec.secrets": {"spec.secrets": []},
    "spec.podTemplate": {"spec.podTemplate": {"metadata": {"labels": {"a": "b"}}}},
}
"""For each changeable field an edit of FULL that changes it."""


def job_of(document: Document, attempt: int = 0) -> FineTuneJob:
    """Return a job; one whose first attempt has begun has also written its outputs, so that all limits apply."""
    outputs = [{"format": "webui", "to": "/out", "bytes": 1}] if attempt else []
    return FineTuneJob.model_validate({**document, "status": {"attempt": attempt, "outputs": outputs}})


def refused(patch: dict[str, Any], attempt: int) -> list[str]:
    return [fixed.path for fixed in edits.forbidden_edits(job_of(FULL, attempt), job_of(patched(FULL, patch)))]


def leaves(path: str, schema: dict[str, Any]) -> Iterator[str]:
    for name, field in schema.get("properties", {}).items():
        below = f"{path}.{name}"
        yield from [below] if "properties" not in field else leaves(below, field)


def test_every_field_of_the_spec_is_fixed_or_changeable() -> None:
    fixed = {entry.path for entry in edits.FIXED}
    assert not fixed & edits.CHANGEABLE.keys()
    for leaf in leaves("spec", crd.find("spec")):
        covering = [path for path in (*fixed, *edits.CHANGEABLE) if f"{leaf}.".startswith(f"{path}.")]
        is_exception = leaf in edits.LIMITED or leaf in edits.CHANGEABLE
        assert len(covering) - (is_exception and "spec.training" in covering) == 1, leaf


def test_the_same_manifest_continues_a_job_of_version_0_1_0() -> None:
    """That version stored its defaults in each job; those of DreamBooth are different now."""
    manifest = parse_job(GOOD["dreambooth"])
    assert manifest.spec.training.learning_rate is None
    stored = parse_job(
        patched(GOOD["dreambooth"], {"spec.training.learningRate": 1e-4, "spec.training.centerCrop": False})
    )
    begun = stored.model_copy(update={"status": FineTuneJobStatus(attempt=1)})
    assert [fixed.path for fixed in forbidden_edits(begun, manifest)] == ["spec.training"]
    assert keep_earlier_defaults(begun, manifest).spec == stored.spec
    other = parse_job(patched(GOOD["dreambooth"], {"spec.training.learningRate": 3e-5}))
    assert keep_earlier_defaults(other, manifest) is manifest
    assert keep_earlier_defaults(begun, other).spec.training.learning_rate == 3e-5


def test_both_lists_contain_existing_fields_only() -> None:
    for path in (*(entry.path for entry in edits.FIXED), *edits.CHANGEABLE):
        assert crd.find(path)
    assert CHANGES.keys() == {entry.path for entry in edits.FIXED}
    assert ALLOWED.keys() == edits.CHANGEABLE.keys()


@pytest.mark.parametrize("path", CHANGES)
def test_fixed_fields_are_refused_after_the_first_attempt_began(path: str) -> None:
    assert path in refused(CHANGES[path], attempt=1)
    assert (path in refused(CHANGES[path], attempt=0)) == (path == "spec.managedBy")


@pytest.mark.parametrize("patch", ALLOWED.values(), ids=ALLOWED.keys())
def test_changeable_fields_are_accepted(patch: dict[str, Any]) -> None:
    assert refused(patch, attempt=1) == []


LONGER: dict[str, Any] = {
    "spec.training.epochs": {"spec.training.epochs": 100},
    "spec.outputs": {"spec.outputs": []},
}
"""For limited fields an edit that is allowed until the outputs are written."""


def running(document: Document) -> FineTuneJob:
    """Return a job whose first attempt runs and has written nothing."""
    return FineTuneJob.model_validate({**document, "status": {"attempt": 1}})


@pytest.mark.parametrize("path", LONGER)
def test_length_and_outputs_may_change_until_the_outputs_are_written(path: str) -> None:
    edited = job_of(patched(FULL, LONGER[path]))
    assert edits.forbidden_edits(running(FULL), edited) == []
    assert refused(LONGER[path], attempt=1) == [path]


def test_steps_can_be_raised_and_no_length_can_be_lowered_or_exchanged() -> None:
    in_steps = patched(FULL, {"spec.training.epochs": REMOVED, "spec.training.steps": 50_000})
    raised = job_of(patched(in_steps, {"spec.training.steps": 60_000}))
    lowered = job_of(patched(in_steps, {"spec.training.steps": 40_000}))
    assert edits.forbidden_edits(running(in_steps), raised) == []
    assert [fixed.path for fixed in edits.forbidden_edits(running(in_steps), lowered)] == ["spec.training.steps"]
    exchanged = [fixed.path for fixed in edits.forbidden_edits(running(FULL), job_of(in_steps))]
    assert exchanged == ["spec.training.steps", "spec.training.epochs"]
    shorter = job_of(patched(FULL, {"spec.training.epochs": 1}))
    assert [fixed.path for fixed in edits.forbidden_edits(running(FULL), shorter)] == ["spec.training.epochs"]


def test_message_names_the_field_and_the_remedy() -> None:
    for fixed in edits.FIXED:
        assert fixed.message.startswith(f"{fixed.name} cannot change after the ")
        assert fixed.message.endswith("write the change into a new job with another name")


def test_fixed_part_leaves_out_changeable_fields() -> None:
    assert edits.fixed_part(FULL["spec"])["topology"] == {
        "accelerator": "gpu",
        "maxNodes": 8,
        "processesPerNode": 4,
    }
    assert "podTemplate" not in edits.fixed_part(FULL["spec"])


@pytest.mark.parametrize(
    ("spec", "ours"),
    [
        ({}, True),
        ({"managedBy": "finetune-operator.io/finetunejob-controller"}, True),
        ({"managedBy": None}, True),
        ({"managedBy": "kueue.x-k8s.io/multikueue"}, False),
        ({"managedBy": "kueue.x-k8s.io/multikueue", "training": "unreadable"}, False),
        (None, True),
    ],
)
def test_jobs_of_other_controllers_are_not_ours(spec: dict[str, Any] | None, ours: bool) -> None:
    assert is_ours({**SMALLEST, "spec": spec}) is ours
