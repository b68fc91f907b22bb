"""Cases of the strategic merge, as `kubectl apply` does it."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.manifests.merge import MERGE_KEYS, MergeError, merge

CASES: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("a new key", {"a": 1}, {"b": 2}, {"a": 1, "b": 2}),
    ("a changed value", {"a": 1}, {"a": 2}, {"a": 2}),
    ("a null removes", {"a": 1, "b": 2}, {"a": None}, {"b": 2}),
    ("objects deeply", {"a": {"x": 1, "y": 2}}, {"a": {"y": 3}}, {"a": {"x": 1, "y": 3}}),
    ("an object over a value", {"a": 1}, {"a": {"x": 1}}, {"a": {"x": 1}}),
    ("a null in a new object", {}, {"a": {"x": None, "y": 1}}, {"a": {"y": 1}}),
    ("an object replaced", {"a": {"x": 1}}, {"a": {"$patch": "replace", "y": 2}}, {"a": {"y": 2}}),
    ("plain lists are replaced", {"command": ["a", "b"]}, {"command": ["c"]}, {"command": ["c"]}),
    (
        "tolerations are atomic",
        {"tolerations": [{"key": "a"}]},
        {"tolerations": [{"key": "b"}]},
        {"tolerations": [{"key": "b"}]},
    ),
    (
        "containers by name",
        {"containers": [{"name": "trainer", "image": "a", "command": ["run"]}]},
        {"containers": [{"name": "sidecar", "image": "s"}, {"name": "trainer", "image": "b"}]},
        {
            "containers": [
                {"name": "trainer", "image": "b", "command": ["run"]},
                {"name": "sidecar", "image": "s"},
            ]
        },
    ),
    (
        "environment by name, an item with a source is replaced",
        {"env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]},
        {"env": [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}]},
        {
            "env": [
                {"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                {"name": "B", "value": "2"},
            ]
        },
    ),
    (
        "volumes by name, an item with a source is replaced",
        {"volumes": [{"name": "checkpoints", "emptyDir": {}}]},
        {"volumes": [{"name": "checkpoints", "persistentVolumeClaim": {"claimName": "c"}}]},
        {"volumes": [{"name": "checkpoints", "persistentVolumeClaim": {"claimName": "c"}}]},
    ),
    (
        "mounts by path",
        {"volumeMounts": [{"name": "a", "mountPath": "/a"}]},
        {"volumeMounts": [{"name": "b", "mountPath": "/a"}, {"name": "c", "mountPath": "/c"}]},
        {"volumeMounts": [{"name": "b", "mountPath": "/a"}, {"name": "c", "mountPath": "/c"}]},
    ),
    (
        "an item deleted",
        {"env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]},
        {"env": [{"name": "A", "$patch": "delete"}, {"name": "C", "$patch": "delete"}]},
        {"env": [{"name": "B", "value": "2"}]},
    ),
    (
        "an item replaced",
        {"containers": [{"name": "trainer", "image": "a", "command": ["run"]}]},
        {"containers": [{"name": "trainer", "$patch": "replace", "image": "b"}]},
        {"containers": [{"name": "trainer", "image": "b"}]},
    ),
    ("a list over nothing", {}, {"env": [{"name": "A", "value": "1"}]}, {"env": [{"name": "A", "value": "1"}]}),
]


@pytest.mark.parametrize(("base", "patch", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_merge(base: dict[str, Any], patch: dict[str, Any], expected: dict[str, Any]) -> None:
    before = deepcopy((base, patch))
    assert merge(base, patch) == expected
    assert (base, patch) == before


@pytest.mark.parametrize("item", [{"image": "mine"}, "trainer", None])
def test_item_without_its_merge_key_is_refused(item: object) -> None:
    with pytest.raises(MergeError, match="an item of containers has no name, which is needed to merge it; write name"):
        merge({}, {"containers": [item]})


SCALARS = st.one_of(st.integers(), st.text(max_size=3), st.booleans())
NAMED = st.lists(
    st.fixed_dictionaries({"name": st.sampled_from("abc")}, optional={"value": SCALARS}),
    unique_by=lambda item: item["name"],
)
OBJECTS = st.recursive(
    st.dictionaries(st.sampled_from("pqr"), SCALARS, max_size=3),
    lambda inner: st.fixed_dictionaries({}, optional={"p": inner, "q": SCALARS, "containers": NAMED, "env": NAMED}),
    max_leaves=5,
)


@given(OBJECTS, OBJECTS)
def test_merge_is_idempotent(base: dict[str, Any], patch: dict[str, Any]) -> None:
    once = merge(base, patch)
    assert merge(once, patch) == once


@given(OBJECTS)
def test_empty_patch_and_empty_base(value: dict[str, Any]) -> None:
    assert merge(value, {}) == value
    assert merge({}, value) == value


def test_lists_without_a_key_are_not_merged_by_item() -> None:
    assert not {"tolerations", "envFrom", "command", "args"} & MERGE_KEYS.keys()
