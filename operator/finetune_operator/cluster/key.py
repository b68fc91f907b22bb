"""The name of a job. Apart from the protocol, for the command line reads it before it imports anything heavy."""

from __future__ import annotations

from typing import NamedTuple


class JobKey(NamedTuple):
    """Names a job."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"
