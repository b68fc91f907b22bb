"""Kubernetes quantities, e.g. 500m or 32Gi."""

from __future__ import annotations

import re
from decimal import Decimal

_QUANTITY = re.compile(r"^\+?([0-9.]+)([KMGTPE]i|[numkMGTPE]?|[eE][-+]?[0-9]+)$")
_SCALES = {
    unit: Decimal(1000) ** power for power, unit in enumerate(("n", "u", "m", "", "k", "M", "G", "T", "P", "E"), -3)
}
_SCALES |= {f"{unit}i": Decimal(1024) ** power for power, unit in enumerate("KMGTPE", 1)}


def parse_quantity(text: str) -> Decimal:
    """Parse a Kubernetes quantity, e.g. '32Gi' as 34359738368.

    Raises:
        ValueError: the text is not a quantity.
    """
    match = _QUANTITY.match(text)
    if match is None:
        raise ValueError(f"{text!r} is not a Kubernetes quantity; write e.g. 8, 500m or 32Gi")
    number, unit = Decimal(match[1]), match[2]
    if unit not in _SCALES:
        return number * Decimal(10) ** int(unit[1:])
    return number * _SCALES[unit]
