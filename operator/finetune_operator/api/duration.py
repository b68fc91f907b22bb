"""Lengths of time as people write and read them: '90s', '1h30m', '4m10s'."""

from __future__ import annotations

import re

_UNITS = {"h": 3600, "m": 60, "s": 1}
PATTERN = r"^([0-9]{1,6}h)?([0-9]{1,6}m)?([0-9]{1,6}s)?$"
"""What a duration looks like; the empty text and zero fit it, too, and are refused by `parse` and by the rules."""


def parse_seconds(text: str) -> int:
    """Read a duration, e.g. '1h30m' as 5400.

    Raises:
        ValueError: it is not one, or it is no time at all.
    """
    if not re.fullmatch(PATTERN, text):
        raise ValueError(f"{text!r} is not a duration; write e.g. 90s, 10m or 1h30m")
    seconds = sum(int(number) * _UNITS[unit] for number, unit in re.findall(r"([0-9]+)([hms])", text))
    if seconds == 0:
        raise ValueError(f"{text!r} is no time at all; write e.g. 90s, 10m or 1h30m")
    return seconds


def format_seconds(seconds: float) -> str:
    """Write a duration with its two largest units, e.g. 250 as '4m10s', 93600 as '1d2h'. Rounded; never negative."""
    left = max(0, round(seconds))
    # Rounded to the smaller unit before the larger is chosen, so that 23h59m50s is 1d and not 24h.
    if round(left / 60) >= 24 * 60:
        return _two(round(left / 3600), 24, "d", "h")
    if left >= 3600:
        return _two(round(left / 60), 60, "h", "m")
    return _two(left, 60, "m", "s")


def _two(number: int, base: int, large: str, small: str) -> str:
    """Split a number of small units, e.g. 250 seconds as '4m10s'; a part that is zero is left out."""
    larges, smalls = divmod(number, base)
    return (f"{larges}{large}" if larges else "") + (f"{smalls}{small}" if smalls or not larges else "")
