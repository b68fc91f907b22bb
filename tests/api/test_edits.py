"""Edits of a job whose first attempt has begun; every field of the spec is either fixed or changeable."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from finetune_operator.api import crd
from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.managed import is_ours
from finetune_operator.api.rules import edits
from tests.api.manifests import FULL, REMOVED, SMALLEST, Document, patched

CHANGES: dict[str, Any] = {
    "spec.model": {"spec.model.revision": "fp32"},
    "spec.dataset": {"spec.dataset.maxSamples": 2000},
    "spec.training": {"spec.training.learningRate": 1e-3},
    "spec.topology.accelerator": {
        "spec.topology.accelerator": "cpu",
        "spec.training.memoryPreset": REMOVED,
        "spec.training.optimizer": "adamw",
        "spec.training.attention": "auto",
        "spec.topology.resources": {"cpu": 4},
    },
    "spec.topology.nodes": {
        "spec.topology.nodes": 4,
        "spec.topology.minNodes": REMOVED,
        "spec.topology.maxNodes": REMOVED,
    },
    "spec.topology.maxNodes": {"spec.topology.maxNodes": 6},
    "spec.topology.processesPerNode": {
        "spec.topology.processesPerNode": 2,
        "spec.topology.resources": {"cpu": 4},
    },
    "spec.topology.cpu": {
        "spec.topology.accelerator": "cpu",
        "spec.topology.cpu.backend": "ccl",
        "spec.training.memoryPreset": REMOVED,
        "spec.training.optimizer": "adamw",
        "spec.training.attention": "auto",
        "spec.topology.resources": {"cpu": 4},
    },
    "spec.checkpoint": {"spec.checkpoint.keep": 7},
    "spec.outputs": {"spec.outputs": []},
    "spec.queueName": {"spec.queueName": REMOVED},
    "spec.managedBy": {"spec.managedBy": "kueue.x-k8s.io/multikueue"},
}
"""For each fixed field an edit of FULL that changes it."""

ALLOWED: dict[str, Any] = {
    "spec.topology.minNodes": {"spec.topology.minNodes": 1},
    "spec.recovery.shrinkAfter": {"spec.recovery.shrinkAfter": "90s"},
    "spec.topology.resources": {"spec.topology.resources": {"memory": "128Gi"}},
    "spec.recovery.maxFailures": {"spec.recovery.maxFailures": 9},
    "spec.recovery.spot": {"spec.recovery.spot": REMOVED},
    "spec.recovery.hangTimeout": {"spec.recovery.hangTimeout": "2h"},
    "spec.recovery.noticeSeconds": {"spec.recovery.noticeSeconds": 60},
    "spec.suspend": {"spec.suspend": False},
    "spec.priorityClassName": {"spec.priorityClassName": "high"},
    "spec.activeDeadlineSeconds": {"spec.activeDeadlineSeconds": REMOVED},
    "spec.ttlSecondsAfterFinished": {"spec.ttlSecondsAfterFinished": 60},
    "spec.secrets": {"spec.secrets": []},
    "spec.podTemplate": {"spec.podTemplate": {"metadata": {"labels": {"a": "b"}}}},
}
"""For each changeable field an edit of FULL that changes it."""


def job_of(document: Document, attempt: int = 0) -> FineTuneJob:
    return FineTuneJob.model_validate({**document, "status": {"attempt": attempt}})


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
        assert len(covering) == 1, leaf


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
