"""Durations in the form that users write and read: '90s', '1h30m', '4m10s'."""

from __future__ import annotations

import re

_UNITS = {"h": 3600, "m": 60, "s": 1}
PATTERN = r"^([0-9]{1,6}h)?([0-9]{1,6}m)?([0-9]{1,6}s)?$"
"""Form of a duration. It also matches the empty string and zero, which `parse_seconds` and the rules refuse."""


def parse_seconds(text: str) -> int:
    """Parse a duration, e.g. '1h30m' as 5400.

    Raises:
        ValueError: the text is not a duration, or the duration is zero.
    """
    if not re.fullmatch(PATTERN, text):
        raise ValueError(f"{text!r} is not a duration; write e.g. 90s, 10m or 1h30m")
    seconds = sum(int(number) * _UNITS[unit] for number, unit in re.findall(r"([0-9]+)([hms])", text))
    if seconds == 0:
        raise ValueError(f"{text!r} is zero; write e.g. 90s, 10m or 1h30m")
    return seconds


def format_seconds(seconds: float) -> str:
    """Format a duration with its two largest units, e.g. 250 as '4m10s', 93600 as '1d2h'. Rounded; never negative."""
    left = max(0, round(seconds))
    # Round to the smaller unit before choosing the larger one, so that 23h59m50s becomes 1d and not 24h.
    if round(left / 60) >= 24 * 60:
        return _two_units(round(left / 3600), 24, "d", "h")
    if left >= 3600:
        return _two_units(round(left / 60), 60, "h", "m")
    return _two_units(left, 60, "m", "s")


def _two_units(number: int, base: int, large: str, small: str) -> str:
    """Format a number of small units, e.g. 250 seconds as '4m10s'; a part that is zero is left out."""
    larges, smalls = divmod(number, base)
    return (f"{larges}{large}" if larges else "") + (f"{smalls}{small}" if smalls or not larges else "")
