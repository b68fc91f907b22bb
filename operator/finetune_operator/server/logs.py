"""Log formats: JSON for machines, text for terminals. Both include the job, the attempt and the rank if known."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

FIELDS = ("job", "attempt", "rank", "reason")
"""Fields that a record may have in addition to its message (`extra=`)."""


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """Formats a record as text."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-8s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Format a record; its fields follow the message."""
        fields = [f"{name}={getattr(record, name)}" for name in FIELDS if hasattr(record, name)]
        head, newline, tail = super().format(record).partition("\n")
        return " ".join([head, *fields]) + newline + tail


def configure(form: str, level: str) -> None:
    """Log to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Without this, one line per request would hide all other messages.
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
