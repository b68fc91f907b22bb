"""Log of the supervisor: lines on stderr, next to those of the ranks."""

from __future__ import annotations

import sys


def log(text: str) -> None:
    """Write one line to the pod's log."""
    print(f"[supervisor] {text}", file=sys.stderr, flush=True)  # noqa: T201
