"""How figures are written for people. Pure."""

from __future__ import annotations

from datetime import datetime

from finetune_operator.api.duration import format_seconds
from finetune_operator.api.job import FineTuneJob, FineTuneJobStatus


def plural(number: int, one: str, many: str | None = None) -> str:
    """A number with its noun, e.g. '1 step', '2 steps', '0 steps'."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def size(num_bytes: int) -> str:
    """A size with three digits or so, e.g. '1.2 MiB'."""
    amount = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


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
"""Below so many seconds: the large unit and, where one is shown, the small one. kubectl's rules."""


def age(since: datetime | None, now: datetime) -> str:
    """Time since a moment, rounded down as kubectl does: 119s, 4m10s, 15m, 7h5m, 47h, 3d4h, 15d, 2y3d."""
    if since is None:
        return ""
    total = int((now - since).total_seconds())
    if total < 0:
        return "0s" if total >= -1 else "<invalid>"
    large, unit, small, small_unit = next((row[1:] for row in AGES if total < row[0]), (YEAR, "y", 0, ""))
    rest = total % large // small if small else 0
    return f"{total // large}{unit}" + (f"{rest}{small_unit}" if rest else "")


def seconds(length: float) -> str:
    """A length of time; with a decimal where it is short."""
    return f"{length:.1f} s" if length < 10 else format_seconds(length)


def loss(value: float | None) -> str:
    """A loss with four significant digits."""
    return "" if value is None else f"{value:.4g}"


def rate(images_per_second: float | None) -> str:
    """Images in a second."""
    return "" if images_per_second is None else f"{images_per_second:.3g} images/s"


def steps(status: FineTuneJobStatus) -> str:
    """Finished steps of all, e.g. '40/200'."""
    if status.step is None:
        return ""
    return f"{status.step}/{status.total_steps}" if status.total_steps else str(status.step)


def method(job: FineTuneJob) -> str:
    """What is trained: the method, or 'Script'."""
    chosen = job.spec.training.method
    return "Script" if chosen is None else chosen.value
