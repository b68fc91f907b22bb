"""What the script itself saves and deletes: nothing counts, and nothing is deleted, before all ranks have agreed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_trainer.script.agreement.votes import Pending
from finetune_trainer.script.checkpoints import is_committed, publish
from finetune_trainer.script.saver import Saver

_LOG = logging.getLogger(__name__)


class ScriptSaves:
    """The saves and deletions of the script since the last boundary.

    Args:
        saver: of this rank.
        rank: number of this rank.
    """

    def __init__(self, saver: Saver, rank: int) -> None:
        self._saver = saver
        self._rank = rank
        self.pending: Pending | None = None
        self.is_requested = False
        """Whether the script has asked for a save that all ranks must take together."""
        self._deletions: list[Path] = []

    def save(self, accelerator: Any, folder: str | None, save: Callable[[str | None], Any]) -> Any:
        """Save as the script requests: the folder counts once all ranks have reached the boundary of the step.

        Args:
            accelerator: of the script.
            folder: of the script; None: accelerate chooses it.
            save: accelerate's own save into a folder.
        """
        automatic = accelerator.project_configuration.automatic_checkpoint_naming
        if folder is None or automatic:
            result = save(folder)
            written = final = Path(str(result)).absolute()
        else:
            final = Path(folder).absolute()
            if self._saver.calls_on_rank_0_only(accelerator):
                return self._request(folder)
            replaces, on_all_ranks = is_committed(final), self._saver.saves_on_all_ranks(accelerator)
            # A committed checkpoint of this name stays until the new one is committed.
            written = self._saver.checkpoints.aside(final) if replaces or not on_all_ranks else final
            result = save(str(written))
            if not replaces and not on_all_ranks:
                # The script may use it at once. It counts only from the boundary.
                publish(written, final)
                written = final
        if self._rank == 0:
            self.pending = (written, final)
        return result

    def _request(self, folder: str) -> str:
        """Let all ranks save at the next boundary, because a call of rank 0 alone would wait for the others forever."""
        _LOG.info("the script saves %s on rank 0 only; all ranks save it together, after this step", Path(folder).name)
        self.is_requested = True
        return folder

    def take(self) -> Pending | None:
        """Return what waits to be committed, and forget it."""
        pending, self.pending = self.pending, None
        return pending

    def deletes_later(self, folder: Path, pending: Path | None) -> bool:
        """Return whether the deletion of a folder has to wait.

        Args:
            folder: that the script deletes.
            pending: checkpoint of the script that waits for the votes of the ranks.
        """
        if not is_committed(folder) and folder != pending:
            return False
        if folder not in self._deletions:
            self._deletions.append(folder)
        return True

    def take_deletions(self, newest: Path) -> list[Path]:
        """Return the folders to delete now that a newer checkpoint is committed, and forget them."""
        taken = [each for each in self._deletions if each != newest]
        self._deletions = [each for each in self._deletions if each == newest]
        return taken
