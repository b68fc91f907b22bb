"""What a measurement has found, as JSON lines: each is written as soon as it is known, so a crash loses nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class Recorder:
    """Appends to the records of one measurement."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, **values: Any) -> None:
        """Record values; they replace those of the same name."""
        self._write({"values": values})

    def error(self, reason: str) -> None:
        """Record why the measurement, or a part of it, has no result."""
        self._write({"error": reason})

    def done(self) -> None:
        """Record that nothing more will follow."""
        self._write({"done": True})

    def _write(self, line: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


@dataclass
class Outcome:
    """The result of one measurement, possibly a part of it.

    Attributes:
        values: what was measured.
        error: why something is missing; None if nothing is.
        seconds: time that it took.
        done: whether the measurement came to its end.
    """

    values: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    seconds: float = 0.0
    done: bool = False


def read_records(path: Path) -> Outcome:
    """Return what a measurement has recorded so far. A line that was not completely written is left out."""
    outcome = Outcome()
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        outcome.values.update(record.get("values", {}))
        outcome.error = record.get("error", outcome.error)
        outcome.done = outcome.done or "done" in record
    return outcome
