"""A manifest with one problem; `bad_manifests` has the list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.api.manifests import GOOD, Document, patched


@dataclass(frozen=True)
class BadManifest:
    """A manifest with one problem."""

    name: str
    patch: dict[str, Any]
    """Change of the manifest `base` that causes the problem."""
    field: str
    """Field that the message names."""
    message: str
    """Part of the message."""
    base: str = "smallest"
    reaches_schema: bool = True
    """Whether the API server checks it with the schema of a FineTuneJob."""

    @property
    def document(self) -> Document:
        return patched(GOOD[self.base], self.patch)
