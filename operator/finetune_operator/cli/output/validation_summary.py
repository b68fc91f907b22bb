"""Summarizes the result files of a validation: the held-out loss before and after, and the picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from finetune_contract import paths
from finetune_operator.cluster.local.files import BrokenFileError, read_json


def describe_validation(folder: Path) -> Iterator[str]:
    """Yield lines about a job's validation; none if the job has no validation or its files cannot be read."""
    try:
        losses = read_json(folder / paths.LOSSES, list) or []
        first, last = losses[0], losses[-1]
        change = last["loss"] / first["loss"] - 1
        before, after = (f"{entry['loss']:.4f} at step {entry['step']}" for entry in (first, last))
        yield f"held-out loss {before}, {after} ({change:+.0%})"
    except (BrokenFileError, LookupError, TypeError, ValueError, ZeroDivisionError):
        pass
    if (folder / paths.GRID).is_file():
        yield f"pictures before and after: {folder / paths.GRID}"
