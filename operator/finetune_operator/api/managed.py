"""Decides whether this operator manages a job: `spec.managedBy`, as in a batch/v1 Job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_operator.api.job import CONTROLLER
from finetune_operator.api.kueue import MULTIKUEUE


def is_ours(document: Mapping[str, Any], *, delegates: bool = False) -> bool:
    """Return whether this operator manages a job, or, if `delegates` is true, requests its admission by MultiKueue.

    The argument is the stored object, not a FineTuneJob: the jobs of another controller must be ignored even if they
    cannot be parsed.
    """
    spec = document.get("spec")
    manager = spec.get("managedBy") if isinstance(spec, Mapping) else None
    return manager in (None, CONTROLLER) or (delegates and manager == MULTIKUEUE)
