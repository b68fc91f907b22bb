"""Optional objects of jobs, and the APIs that a cluster may not serve."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from finetune_operator.api import labels, names
from finetune_operator.api.job import KIND, SchedulingMode
from finetune_operator.cluster.kube.client.client import NOT_FOUND, ApiError
from finetune_operator.cluster.kube.client.objects import Resource
from finetune_operator.cluster.kube.optional.children import (
    OptionalChildren,
    decoder,
    optional_resources,
    resource_of,
)
from finetune_operator.cluster.kube.optional.discovery import find_served
from finetune_operator.cluster.kube.optional.evictions import names_responders
from finetune_operator.plan.model.types import ObservedChild
from finetune_operator.settings import Settings

V1BETA1, V1ALPHA2 = (f"scheduling.k8s.io/{version}" for version in ("v1beta1", "v1alpha2"))


class FakeApi:
    """Answers GET with known documents, and 404 for all others."""

    def __init__(self, **documents: Any) -> None:
        self.documents = {path.replace("__", "/"): value for path, value in documents.items()}

    async def get(self, path: str) -> Any:
        if path not in self.documents:
            raise ApiError(NOT_FOUND, "NotFound", path)
        return self.documents[path]


def serving(**resources: list[str]) -> Any:
    """Return an API that serves versions of scheduling.k8s.io with these resources."""
    api = FakeApi()
    for version, plurals in resources.items():
        listed = {"resources": [{"name": plural} for plural in plurals]}
        api.documents[f"/apis/scheduling.k8s.io/{version}"] = listed
    return api


GROUPS = (resource_of(V1BETA1, "PodGroup"), resource_of(V1ALPHA2, "PodGroup"))


@pytest.mark.parametrize(
    ("api", "found"),
    [
        (serving(v1alpha2=["workloads", "podgroups", "podgroups/status"]), GROUPS[1]),
        (serving(v1alpha2=["podgroups"], v1beta1=["podgroups"]), GROUPS[0]),
        # The version is served, and its feature gate is off.
        (serving(v1beta1=["priorityclasses"]), None),
        (serving(), None),
    ],
)
def test_first_served_version_counts(api: Any, found: Resource | None) -> None:
    assert asyncio.run(find_served(api, GROUPS)) == found


@pytest.mark.parametrize(("minor", "known"), [("36", False), ("37", True), ("37+", True), ("41", True), ("", False)])
def test_pods_name_responders_from_kubernetes_1_37_on(minor: str, known: bool) -> None:
    api: Any = FakeApi(__version={"major": "1", "minor": minor})
    assert asyncio.run(names_responders(api)) is known


def test_settings_decide_which_apis_are_looked_for() -> None:
    assert optional_resources(Settings()) == ()
    roots = [[resource.root for resource in each] for each in optional_resources(Settings(gangs=True))]
    assert roots == [
        [f"/apis/{V1BETA1}", f"/apis/{V1ALPHA2}"],
        ["/apis/scheduling.volcano.sh/v1beta1"],
        ["/apis/scheduling.x-k8s.io/v1alpha1"],
    ]
    assert optional_resources(Settings(disruption_budgets=True)) == (
        (Resource("/apis/policy/v1", "poddisruptionbudgets"),),
    )


def test_only_apis_whose_objects_are_known_are_used() -> None:
    woken: list[str] = []
    api: Any = FakeApi()
    children = OptionalChildren(api, lambda _key, _old, _new: None, lambda: woken.append("all"))
    children.add(GROUPS[1])
    assert (children.gang_apis(), children.served) == ({}, frozenset())
    children.set_synced(GROUPS[1])
    assert children.gang_apis() == {SchedulingMode.POD_GROUP: V1ALPHA2}
    assert (children.served, woken) == (frozenset({V1ALPHA2}), ["all"])


def test_reading_a_pod_group() -> None:
    owner = {"kind": KIND, "uid": "owner", "controller": True}
    own = {labels.JOB: "circles", labels.MANAGED_BY: names.OPERATOR, labels.ATTEMPT: "3"}
    meta = {"name": "circles-a3", "namespace": "team", "uid": "u", "labels": own, "ownerReferences": [owner]}
    found = decoder(V1ALPHA2, "PodGroup")({"metadata": meta})
    assert found is not None
    assert (found.job, found.owner_uid) == (("team", "circles"), "owner")
    assert found.observed == ObservedChild(V1ALPHA2, "PodGroup", "circles-a3", "u", 3)
    changes: tuple[dict[str, Any], ...] = ({"labels": {}}, {"deletionTimestamp": "2026-01-01T00:00:00Z"})
    for change in changes:
        assert decoder(V1ALPHA2, "PodGroup")({"metadata": {**meta, **change}}) is None
