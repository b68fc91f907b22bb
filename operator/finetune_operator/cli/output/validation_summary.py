"""What a validation has left to look at: the held-out loss before and after, and the picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from finetune_contract import paths
from finetune_operator.cluster.local.files import BrokenFileError, read_json


def looks(folder: Path) -> Iterator[str]:
    """Lines for a person; none where the job validated nothing, or left nothing that can be read."""
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
