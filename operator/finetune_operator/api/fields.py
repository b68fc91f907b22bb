"""Types of fields that several parts of the FineTuneJob share."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, JsonValue

Duration = Annotated[str, Field(max_length=32)]
"""A duration: '90s', '10m', '1h30m'. The rules check its form, `duration` parses it."""
ObjectName = Annotated[str, Field(min_length=1, max_length=253)]
"""Name of a Kubernetes object. The rules check its form."""
ManagerName = Annotated[str, Field(min_length=1, max_length=63)]
"""Name of a controller, prefixed with its domain. The rules check its form."""
Path = Annotated[str, Field(min_length=1, max_length=1024)]
"""Absolute path."""
Quantity = Annotated[str, Field(max_length=32)] | int
"""Amount of a resource: 8, 500m, 32Gi. The rules check its form."""


def list_map(key: str) -> dict[str, JsonValue]:
    """Return the schema of a list whose items are identified by `key`, so that several writers can share the list."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}
