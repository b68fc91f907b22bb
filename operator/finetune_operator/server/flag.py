"""A flag of the operator, with its environment variable and the schema of its value; and the parsers of values."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PREFIX = "FINETUNE_"
MAX_NAME = 253
NAME = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
LABEL = rf"({NAME}/)?[A-Za-z0-9]([-A-Za-z0-9_.]{{0,61}}[A-Za-z0-9])?"


@dataclass(frozen=True)
class Flag:
    """A flag, with its environment variable."""

    name: str
    default: Any
    help: str
    read: Callable[[str], Any] = str
    choices: tuple[str, ...] | None = None
    between: tuple[float, float] | None = None
    """Smallest and largest number."""

    def parse(self, text: Any) -> Any:
        """Parse a value of the command line or the environment; argparse also passes a default that is a string.

        Raises:
            argparse.ArgumentTypeError: the value is not valid.
        """
        if self.between is None:
            return self.read(text)
        lowest, highest = self.between
        try:
            value = self.read(text)
        except ValueError:
            value = math.nan
        if not lowest <= value <= highest:
            kind = "a whole number" if self.read is int else "a number"
            raise argparse.ArgumentTypeError(
                f"invalid value {text!r}: write {kind} from {lowest:.10g} to {highest:.10g}"
            )
        return value

    @property
    def schema(self) -> dict[str, Any]:
        """Return the JSON schema of a value, for the chart."""
        if self.choices:
            return {"enum": list(self.choices)}
        if self.between is not None:
            bounds = {"minimum": self.between[0], "maximum": self.between[1]}
            if self.read is int:
                return {"type": "integer"} | bounds
            # `helm --set` passes a number with a decimal point as text.
            return {"anyOf": [{"type": "number"} | bounds, {"type": "string", "pattern": r"^[0-9]+\.[0-9]+$"}]}
        if self.read is parse_bool:
            return {"type": "boolean"}
        if self.read in PATTERNS:
            return {"type": "string", "maxLength": MAX_NAME, "pattern": f"^{PATTERNS[self.read]}$"}
        return {"type": "string", "pattern": r"^\S+$"}

    @property
    def variable(self) -> str:
        """Name of the environment variable."""
        return PREFIX + self.name.replace("-", "_").upper()


def parse_bool(text: str) -> bool:
    """Parse true or false."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"invalid value {text!r}: write true or false")
    return text.lower() == "true"


def parse_name(text: str) -> str:
    """Parse the name of an object; empty: none."""
    if text and (len(text) > MAX_NAME or not re.fullmatch(NAME, text)):
        raise argparse.ArgumentTypeError(
            f"invalid name {text!r}: write lower-case letters, digits and '-', for example my-name"
        )
    return text


def parse_label(text: str) -> str:
    """Parse the name of a label; empty: none."""
    if text and (len(text) > MAX_NAME or not re.fullmatch(LABEL, text)):
        raise argparse.ArgumentTypeError(f"invalid label {text!r}: write its name, for example example.com/rack")
    return text


def parse_names(text: str) -> tuple[str, ...]:
    """Parse names of objects, separated by commas."""
    return tuple(parse_name(name.strip()) for name in text.split(",") if name.strip())


def parse_url(text: str) -> str:
    """Parse a URL of HTTP or HTTPS; empty: none."""
    if text and (urlsplit(text).scheme not in ("http", "https") or not urlsplit(text).hostname):
        raise argparse.ArgumentTypeError(f"invalid URL {text!r}: write https://host:port")
    return text


PATTERNS: dict[Callable[[str], Any], str] = {parse_name: NAME, parse_label: LABEL}
METAVARS: dict[Callable[[str], Any], str] = {
    parse_bool: "true|false",
    parse_name: "NAME",
    parse_names: "NAME,...",
    parse_label: "LABEL",
    parse_url: "URL",
    int: "N",
    float: "N",
    Path: "FILE",
}
