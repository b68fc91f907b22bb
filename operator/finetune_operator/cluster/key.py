"""The key of a job. Separate from the protocol, because the command line imports it before anything heavy."""

from __future__ import annotations

from typing import NamedTuple


class JobKey(NamedTuple):
    """Namespace and name of a job."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"
