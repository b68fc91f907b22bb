"""The attempt fence: marks on the shared storage by which an attempt learns that a newer one has begun.

Rank 0 marks its attempt before it looks for a checkpoint, and looks for a newer mark before it commits or deletes
anything. A mark is a file of its own that is made once and never written again, so it needs no lock.
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
        """Say that this attempt has begun.

        Raises:
            SupersededError: a newer one has begun already.
            OSError: the storage cannot be written.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / paths.fence_mark(self._attempt)).touch()
        sync_folder(self._folder)
        self.check()

    def check(self) -> None:
        """Go on only while no newer attempt has begun.

        Raises:
            SupersededError: one has.
            OSError: the storage cannot be read.
        """
        check_marks((entry.name for entry in self._folder.iterdir()), self._attempt)


def check_marks(names: Iterable[str], attempt: int) -> None:
    """Go on only while none of the marks is a newer attempt's.

    Raises:
        SupersededError: one is.
    """
    newest = max(map(paths.marked_attempt, names), default=0)
    if newest > attempt:
        raise SupersededError(f"attempt {newest} has begun: attempt {attempt} writes nothing more")
