"""What every kind of target offers. `open` chooses one, `export.outputs` calls it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Protocol

from finetune_trainer.delivery.staged import OutputRecord, StagedOutput


class ExportStage(StrEnum):
    """The points of an export at which a kill is tested, in order."""

    WRITE = "export-write"
    """Before the files are written to this machine."""
    WRITTEN = "export-written"
    """All files are written; their record is not."""
    RECORDED = "export-recorded"
    """The record is written: the next attempt does not write the files again."""
    UPLOAD = "export-upload"
    """After each stored part or file; no reader sees it."""
    UPLOADED = "export-uploaded"
    """Everything is at the target, and nothing is visible."""
    PUBLISH = "export-publish"
    """After each object or file that has become visible."""
    PUBLISHED = "export-published"
    """The output is complete at the target; its record here is not updated."""


class TransferProgress(Protocol):
    """Receives the progress of a delivery."""

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        """Report the bytes that are at the target."""
        ...


OnExportStage = Callable[[ExportStage], None]


class Target(Protocol):
    """A place to which an output is delivered.

    An output becomes visible only when all of its bytes are at the target. Every method may be repeated.

    Attributes:
        location: what the status shows: a folder or a URL.
    """

    location: str

    def check(self, names: Sequence[str]) -> None:
        """Check that an output of this job can be delivered. Readers do not see what this writes.

        Args:
            names: files that the output is sure to have; empty if they are not known yet.

        Raises:
            ConfigError: it cannot; the message names the field and the remedy.
            NetworkError, StorageOutageError: the target does not answer.
        """
        ...

    def holds(self, record: OutputRecord) -> bool:
        """Return whether exactly this output is complete at the target."""
        ...

    def deliver(self, output: StagedOutput, on_stage: OnExportStage, progress: TransferProgress) -> None:
        """Deliver an output. What an earlier call has brought to the target is not sent again.

        Raises:
            ConfigError: the target refuses it for good; the message names the field and the remedy.
            StorageError, NetworkError, StorageOutageError: the target does not answer, or fails.
        """
        ...
