"""Formats numbers, sizes, ages and names for output. Pure."""

from __future__ import annotations

from datetime import datetime

from finetune_operator.api.duration import format_seconds
from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.status import FineTuneJobStatus, PerformanceStatus


def pluralize(number: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun, e.g. '1 step', '2 steps', '0 steps'."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def format_size(num_bytes: int) -> str:
    """Return a size with a binary unit, e.g. '1.2 MiB'."""
    amount = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def format_memory(performance: PerformanceStatus) -> str:
    """Return the memory that a rank uses, e.g. '31.2 GiB allocated, 35.0 GiB reserved, of 79.1 GiB'."""
    parts = [f"{format_size(performance.memory_allocated_bytes or 0)} allocated"]
    if performance.memory_reserved_bytes is not None:
        parts.append(f"{format_size(performance.memory_reserved_bytes)} reserved")
    if performance.memory_total_bytes is not None:
        parts.append(f"of {format_size(performance.memory_total_bytes)}")
    return ", ".join(parts)


MINUTE, HOUR, DAY, YEAR = 60, 3600, 86_400, 365 * 86_400
AGES = (
    (2 * MINUTE, 1, "s", 0, ""),
    (10 * MINUTE, MINUTE, "m", 1, "s"),
    (3 * HOUR, MINUTE, "m", 0, ""),
    (8 * HOUR, HOUR, "h", MINUTE, "m"),
    (2 * DAY, HOUR, "h", 0, ""),
    (8 * DAY, DAY, "d", HOUR, "h"),
    (2 * YEAR, DAY, "d", 0, ""),
    (8 * YEAR, YEAR, "y", DAY, "d"),
)
"""Rows of kubectl's rules: upper limit in seconds, seconds and name of the large unit, the same of the small unit.

A small unit of 0 seconds is not shown.
"""


def format_age(since: datetime | None, now: datetime) -> str:
    """Return the time since a moment, rounded down as kubectl does: 119s, 4m10s, 15m, 7h5m, 47h, 3d4h, 15d, 2y3d."""
    if since is None:
        return ""
    total = int((now - since).total_seconds())
    if total < 0:
        return "0s" if total >= -1 else "<invalid>"
    large, unit, small, small_unit = next((row[1:] for row in AGES if total < row[0]), (YEAR, "y", 0, ""))
    rest = total % large // small if small else 0
    return f"{total // large}{unit}" + (f"{rest}{small_unit}" if rest else "")


def format_duration(length: float) -> str:
    """Return a duration; below 10 seconds with one decimal."""
    return f"{length:.1f} s" if length < 10 else format_seconds(length)


def format_loss(value: float | None) -> str:
    """Return a loss with four significant digits."""
    return "" if value is None else f"{value:.4g}"


def format_rate(images_per_second: float | None) -> str:
    """Return a speed in images per second."""
    return "" if images_per_second is None else f"{images_per_second:.3g} images/s"


def format_steps(status: FineTuneJobStatus) -> str:
    """Return finished and total steps, e.g. '40/200'."""
    if status.step is None:
        return ""
    return f"{status.step}/{status.total_steps}" if status.total_steps else str(status.step)


def format_method(job: FineTuneJob) -> str:
    """Return the name of the method, or 'Script'."""
    chosen = job.spec.training.method
    return "Script" if chosen is None else chosen.value
