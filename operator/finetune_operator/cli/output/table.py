"""Tables and blocks as kubectl prints them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Rows = Iterable[Sequence[str]]


def columns(header: Sequence[str], rows: Rows, gap: int = 3) -> str:
    """Left-aligned columns, three spaces apart; no space behind the last one."""
    table = [list(header), *([cell or "" for cell in row] for row in rows)]
    widths = [max(len(row[index]) for row in table) for index in range(len(header))]
    lines = ["".join(cell.ljust(width + gap) for cell, width in zip(row, widths, strict=True)) for row in table]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def block(fields: Iterable[tuple[str, str]], indent: int = 0) -> str:
    """Names with colons and values behind them, aligned; further lines of a value below its first."""
    named = [(name + ":", value) for name, value in fields]
    width = max((len(name) for name, _ in named), default=0) + 2
    lines = []
    for name, value in named:
        first, *rest = value.splitlines() or [""]
        lines.append(f"{' ' * indent}{name.ljust(width)}{first}".rstrip())
        lines += [" " * (indent + width) + line for line in rest]
    return "\n".join(lines) + "\n"


def indented(text: str, indent: int = 2) -> str:
    """A text moved to the right."""
    return "".join(" " * indent + line for line in text.splitlines(keepends=True))
