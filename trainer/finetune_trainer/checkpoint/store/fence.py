"""The attempt fence: marks on the shared storage by which an attempt learns that a newer one has begun.

Rank 0 marks its attempt before it searches for a checkpoint, and checks for a newer mark before it commits or deletes
anything. Each mark is a separate file that is created once and never rewritten, so it needs no lock.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from finetune_contract import paths
from finetune_trainer.errors import SupersededError
from finetune_trainer.files import sync_folder


class Fence:
    """The fence of one job, as one attempt sees it."""

    def __init__(self, job_dir: Path, attempt: int) -> None:
        self._folder = paths.fence(job_dir)
        self._attempt = attempt

    def mark(self) -> None:
        """Record that this attempt has begun.

        Raises:
            SupersededError: a newer attempt has begun.
            OSError: the storage cannot be written.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / paths.fence_mark(self._attempt)).touch()
        sync_folder(self._folder)
        self.check()

    def check(self) -> None:
        """Raise an error if a newer attempt has begun.

        Raises:
            SupersededError: a newer attempt has begun.
            OSError: the storage cannot be read.
        """
        check_marks((entry.name for entry in self._folder.iterdir()), self._attempt)


def check_marks(names: Iterable[str], attempt: int) -> None:
    """Raise an error if one of the marks is from a newer attempt.

    Raises:
        SupersededError: a newer attempt has begun.
    """
    newest = max(map(paths.marked_attempt, names), default=0)
    if newest > attempt:
        raise SupersededError(f"attempt {newest} has begun: attempt {attempt} stops writing")
