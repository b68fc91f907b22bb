"""Kubernetes' strategic merge for pods: how `spec.podTemplate` is laid over what the operator renders.

Objects are merged key by key, `null` removes a key, and lists are replaced whole, except those below whose items have
a key of their own: they are merged item by item, and `$patch: delete` or `$patch: replace` in an item does that to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DIRECTIVE = "$patch"

MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "ports": "containerPort",
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "volumes": "name",
    "imagePullSecrets": "name",
    "hostAliases": "ip",
    "topologySpreadConstraints": "topologyKey",
    "schedulingGates": "name",
    "resourceClaims": "name",
}
"""The patchMergeKey of each list in PodSpec that has one. Tolerations and envFrom, among others, have none."""

EXCLUSIVE = frozenset({"env", "volumes"})
"""Lists whose items hold one of several sources: an item is replaced whole, for two sources in one are refused."""


class MergeError(ValueError):
    """A patch that cannot be laid over anything; the message says where and why."""


def merge(base: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """Lay a patch over an object; neither is changed.

    Raises:
        MergeError: an item of a list that is merged by a key lacks that key.
    """
    if patch.get(DIRECTIVE) == "replace":
        return {key: value for key, value in patch.items() if key != DIRECTIVE}
    merged = dict(base)
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _merge_value(key, merged.get(key), value)
    return merged


def _merge_value(key: str, base: Any, value: Any) -> Any:
    if isinstance(value, Mapping):
        return merge(base if isinstance(base, Mapping) else {}, value)
    if isinstance(value, list) and key in MERGE_KEYS:
        for item in value:
            if not isinstance(item, Mapping) or MERGE_KEYS[key] not in item:
                raise MergeError(f"an item of {key} has no {MERGE_KEYS[key]}; write one, for items are merged by it")
        return _merge_items(base if isinstance(base, list) else [], value, MERGE_KEYS[key], key in EXCLUSIVE)
    return value


def _merge_items(base: list[Any], patch: list[Any], name: str, exclusive: bool) -> list[Any]:
    """Merge two lists by the key of their items: those of the base keep their order, new ones come behind."""
    items = {item[name]: item for item in base}
    for item in patch:
        key = item[name]
        if item.get(DIRECTIVE) == "delete":
            items.pop(key, None)
        elif key in items and not exclusive:
            items[key] = merge(items[key], item)
        else:
            items[key] = merge({}, item)
    return list(items.values())
