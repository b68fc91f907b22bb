"""Whose job it is: `spec.managedBy`, as a batch/v1 Job has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_operator.api.job import CONTROLLER


def is_ours(document: Mapping[str, Any]) -> bool:
    """Whether this operator takes care of a job.

    It takes the object as it was stored, not a FineTuneJob: another controller's job is none of our business even
    where we could not read it.
    """
    spec = document.get("spec")
    manager = spec.get("managedBy") if isinstance(spec, Mapping) else None
    return manager in (None, CONTROLLER)
