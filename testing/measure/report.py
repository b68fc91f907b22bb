"""Output of every measurement: a table for users, then one line of JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return rows under a header as text; each column is as wide as its widest cell."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def finish(header: Sequence[str], rows: Sequence[Sequence[object]], result: Mapping[str, object]) -> None:
    """Print the table, then the result as one line of JSON."""
    print(f"\n{table(header, rows)}\n", flush=True)
    print(json.dumps(result), flush=True)
