"""Formats tables and lists of fields as kubectl prints them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Rows = Iterable[Sequence[str]]


def format_columns(header: Sequence[str], rows: Rows, gap: int = 3) -> str:
    """Return left-aligned columns, `gap` spaces apart, without trailing spaces."""
    table = [list(header), *([cell or "" for cell in row] for row in rows)]
    widths = [max(len(row[index]) for row in table) for index in range(len(header))]
    lines = ["".join(cell.ljust(width + gap) for cell, width in zip(row, widths, strict=True)) for row in table]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def format_fields(fields: Iterable[tuple[str, str]], indent: int = 0) -> str:
    """Return one line per field: name, colon, aligned value. The other lines of a value follow below its first."""
    named = [(name + ":", value) for name, value in fields]
    width = max((len(name) for name, _ in named), default=0) + 2
    lines = []
    for name, value in named:
        first, *rest = value.splitlines() or [""]
        lines.append(f"{' ' * indent}{name.ljust(width)}{first}".rstrip())
        lines += [" " * (indent + width) + line for line in rest]
    return "\n".join(lines) + "\n"


def indent_lines(text: str, indent: int = 2) -> str:
    """Return a text with every line indented."""
    return "".join(" " * indent + line for line in text.splitlines(keepends=True))
