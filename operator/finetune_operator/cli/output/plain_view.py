"""Output for logs and pipes: one line per event, and progress every few seconds."""

from __future__ import annotations

import sys
from datetime import datetime, timedelta
from typing import TextIO

from finetune_contract.phase import Phase
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.cli.output import changes
from finetune_operator.cli.output.streams import write_flushed
from finetune_operator.cluster.protocol import Clock
from finetune_operator.cluster.reconcile import ReconcileResult

PROGRESS_EVERY = timedelta(seconds=5)


class PlainView:
    """Prints lines. Used as a context manager, like the live view."""

    def __init__(
        self, start: FineTuneJobStatus, now: Clock, out: TextIO = sys.stdout, err: TextIO = sys.stderr
    ) -> None:
        self._status = start
        self._now = now
        self._out = out
        self._err = err
        self._progress_at: datetime | None = None

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *raised: object) -> None:
        return

    def on_reconcile(self, result: ReconcileResult) -> None:
        """Print what changed since the previous reconcile."""
        if result.job is None:
            return
        old, self._status = self._status, result.job.status
        for line in (*changes.describe_commit(old, self._status), *changes.describe_changes(old, self._status)):
            self.print_line(line)
        if self._status.step != old.step and self._is_progress_due():
            self.print_line(changes.format_progress(self._status))

    def print_line(self, line: str) -> None:
        """Print a line with the time of day."""
        write_flushed(self._out, f"{self._now().astimezone():%H:%M:%S}  {line}\n")

    def warn(self, message: str) -> None:
        """Print a warning."""
        write_flushed(self._err, f"finetune: warning: {message}\n")

    def _is_progress_due(self) -> bool:
        """Return whether to print progress: at the first step, the last step, and every few seconds in between."""
        now, status = self._now(), self._status
        first = self._progress_at is None
        last = status.step == status.total_steps
        if status.phase not in (Phase.RUNNING, Phase.EXPORTING) or not (
            first or last or now - (self._progress_at or now) >= PROGRESS_EVERY
        ):
            return False
        self._progress_at = now
        return True
