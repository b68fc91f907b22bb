"""Kubernetes' strategic merge for pods: merges `spec.podTemplate` over the pod that the operator builds.

Objects are merged key by key, and `null` removes a key. Lists are replaced, except the lists in MERGE_KEYS, whose items
have a key: they are merged item by item, and `$patch: delete` or `$patch: replace` in an item deletes or replaces it.
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
"""The patchMergeKey of each list in PodSpec that has one. Tolerations and envFrom, for example, have none."""

EXCLUSIVE = frozenset({"env", "volumes"})
"""Lists whose items contain one of several sources. Items are replaced: the API refuses an item with two sources."""


class MergeError(ValueError):
    """A patch cannot be merged; the message names the field and the problem."""


def merge(base: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object merged with a patch; the arguments are not modified.

    Raises:
        MergeError: an item of a list that is merged by a key has no such key.
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
                raise MergeError(
                    f"an item of {key} has no {MERGE_KEYS[key]}, which is needed to merge it; write {MERGE_KEYS[key]}"
                )
        return _merge_items(base if isinstance(base, list) else [], value, MERGE_KEYS[key], key in EXCLUSIVE)
    return value


def _merge_items(base: list[Any], patch: list[Any], name: str, exclusive: bool) -> list[Any]:
    """Merge two lists by the key of their items: items of the base keep their order, new items follow."""
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
