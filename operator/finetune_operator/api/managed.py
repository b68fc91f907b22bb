"""Decides whether this operator manages a job: `spec.managedBy`, as in a batch/v1 Job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_operator.api.job import CONTROLLER


def is_ours(document: Mapping[str, Any]) -> bool:
    """Return whether this operator manages a job.

    The argument is the stored object, not a FineTuneJob: the jobs of another controller must be ignored even if they
    cannot be parsed.
    """
    spec = document.get("spec")
    manager = spec.get("managedBy") if isinstance(spec, Mapping) else None
    return manager in (None, CONTROLLER)
