"""What the ranks agree on after each step: whether to stop on a preemption notice, and whether to save.

The ranks of short steps do not wait for each other: they post their votes after a step, and read those of all ranks
after the next one. So the agreement costs nothing, and a notice takes one step longer. The ranks of long steps wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetune_trainer.script.agreement.boards import Board, Vote
from finetune_trainer.script.agreement.peers import Peers
from finetune_trainer.script.saver import RankRecord

LONG_STEP_SECONDS = 1.0
"""From this duration of a step on, the ranks wait for the votes of the same step."""

Pending = tuple[Path, Path]
"""Complete checkpoint of the script that is not committed: its present folder, and its final one."""


@dataclass(frozen=True)
class Verdict:
    """What all ranks have agreed on.

    Attributes:
        record: of this rank, after the step in which the votes were posted.
        notice: a rank has received a preemption notice.
        due: an ordinary save is due.
        has_pending: the script has saved on a rank.
        pending: what it has saved, on the rank that knows.
    """

    record: RankRecord
    notice: bool
    due: bool
    has_pending: bool
    pending: Pending | None


class Agreement:
    """The votes of this rank and of the others.

    Args:
        peers: the other ranks.
        board: of all ranks.
        clock: seconds.
    """

    def __init__(self, peers: Peers, board: Board, clock: Callable[[], float] = time.monotonic) -> None:
        self.peers = peers
        self._board = board
        self._clock = clock
        self._posted_at = clock()
        self._posted: tuple[RankRecord, Pending | None] | None = None
        self.delay = 0
        """Steps between a vote and its effect."""

    @property
    def pending_folder(self) -> Path | None:
        """Final folder of a checkpoint of the script that waits for the votes."""
        return self._posted[1][1] if self._posted is not None and self._posted[1] is not None else None

    def post(self, record: RankRecord, *, notice: bool, due: bool, pending: Pending | None) -> None:
        """Post the vote of this rank after a step. The last one must be collected."""
        assert self._posted is None
        now = self._clock()
        microseconds, self._posted_at = int(1e6 * (now - self._posted_at)), now
        self._posted = (record, pending)
        self._board.post(Vote(notice, due, pending is not None, microseconds), record.pack)

    def collect(self) -> Verdict | None:
        """Wait for the votes of all ranks; None if none is posted that is not collected.

        Raises:
            FabricError: a peer was lost.
        """
        if self._posted is None:
            return None
        vote = self._board.collect()
        (record, pending), self._posted = self._posted, None
        self.delay = int(vote.microseconds < 1e6 * LONG_STEP_SECONDS)
        return Verdict(record, vote.notice, vote.due, vote.pending, pending)

    def copies(self) -> dict[int, bytes]:
        """Return the states of other ranks after the last step, as far as this rank holds them."""
        return self._board.copies()
