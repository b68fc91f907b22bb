"""The request of one export pod, and its result: the operator writes the request, the trainer the result."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import Field

from finetune_contract.heartbeat import Count, Text, Wire
from finetune_contract.outputs.environments import needs_export_image
from finetune_contract.outputs.spec import OutputSpec
from finetune_contract.spec_model import SpecModel

MAX_OUTPUTS = 8
"""Outputs of one request: their results fit into a termination message, which holds 4,096 bytes."""


class ExportRequest(SpecModel):
    """Outputs to write from one checkpoint of a job."""

    id: str = Field(default="", max_length=63)
    """Chosen by the client; empty: the job's own outputs, after its last step."""
    step: int | None = Field(default=None, ge=0)
    """Step of the checkpoint; None: the newest one."""
    outputs: Annotated[tuple[OutputSpec, ...], Field(min_length=1, max_length=MAX_OUTPUTS)]

    def to_json(self) -> str:
        """Return compact JSON in a fixed order: the same request gives the same text."""
        return self.model_dump_json(by_alias=True, exclude_none=True, exclude_defaults=True)


class ExportedOutput(Wire):
    """What has become of one output of a request."""

    index: int = Field(ge=0, lt=MAX_OUTPUTS, description="its index in the request")
    size_bytes: Count = 0
    sha256: str | None = Field(default=None, max_length=64)
    error: Text | None = Field(default=None, description="why it is not complete at its target")


class ExportResult(Wire):
    """Termination message of an export pod."""

    step: Count | None = Field(default=None, description="step of the checkpoint")
    outputs: tuple[ExportedOutput, ...] = Field(default=(), max_length=MAX_OUTPUTS)
    message: Text | None = Field(default=None, description="why the export failed")


def written_in_training(outputs: Iterable[OutputSpec]) -> tuple[OutputSpec, ...]:
    """Return the outputs that the ranks write after the last step."""
    return tuple(output for output in outputs if not needs_export_image(output))


def written_by_export(outputs: Iterable[OutputSpec]) -> tuple[OutputSpec, ...]:
    """Return the outputs that an export pod writes after the training."""
    return tuple(output for output in outputs if needs_export_image(output))
