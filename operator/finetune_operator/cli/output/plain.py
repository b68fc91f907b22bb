"""Output for logs and pipes: one line for each thing that happens, progress now and then."""

from __future__ import annotations

import sys
from datetime import datetime, timedelta
from typing import TextIO

from finetune_contract.phase import Phase
from finetune_operator.api.job import FineTuneJobStatus
from finetune_operator.cli.output import story
from finetune_operator.cli.output.stdout import tell
from finetune_operator.cluster.protocol import Clock
from finetune_operator.cluster.reconcile import Pass

PROGRESS_EVERY = timedelta(seconds=5)


class PlainView:
    """Writes lines. Used as a context, as the live view is."""

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

    def see(self, seen: Pass) -> None:
        """Write what is new in a pass."""
        if seen.job is None:
            return
        old, self._status = self._status, seen.job.status
        for line in (*story.committed(old, self._status), *story.happened(old, self._status)):
            self.say(line)
        if self._status.step != old.step and self._is_time():
            self.say(story.progress(self._status))

    def say(self, line: str) -> None:
        """Write a line with the time of day."""
        tell(self._out, f"{self._now().astimezone():%H:%M:%S}  {line}\n")

    def warn(self, sentence: str) -> None:
        """Write a warning."""
        tell(self._err, f"finetune: warning: {sentence}\n")

    def _is_time(self) -> bool:
        """Whether progress is due: the first step, the last one, and every few seconds in between."""
        now, status = self._now(), self._status
        first = self._progress_at is None
        last = status.step == status.total_steps
        if status.phase not in (Phase.RUNNING, Phase.EXPORTING) or not (
            first or last or now - (self._progress_at or now) >= PROGRESS_EVERY
        ):
            return False
        self._progress_at = now
        return True
