"""The pod's termination message: the rank that ended the pod, its exit code and its last output."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import MAX_LAST_OUTPUT, RankEnd, Termination

MAX_MESSAGE_BYTES = 4096
"""Maximum size of a termination message in Kubernetes."""
GOOD_ENDS = frozenset({ExitCode.DONE, ExitCode.SAVED})


def cause_first(ends: Sequence[RankEnd]) -> tuple[RankEnd, ...]:
    """Sort ends by how much they explain: failures first, then lost peers (a consequence), then regular ends.

    Equal ones keep the order in which they occurred.
    """

    def weight(end: RankEnd) -> int:
        if end.exit_code in GOOD_ENDS:
            return 2
        return 1 if end.exit_code == ExitCode.FABRIC else 0

    return tuple(sorted(ends, key=weight))


def pod_exit_code(ends: Sequence[RankEnd]) -> int:
    """Return the exit code of the pod: that of the first failed rank; otherwise SAVED if any rank saved, else DONE."""
    first = cause_first(ends)[0]
    if first.exit_code not in GOOD_ENDS:
        return first.exit_code
    return ExitCode.SAVED if any(end.exit_code == ExitCode.SAVED for end in ends) else ExitCode.DONE


def write_termination(path: Path | None, termination: Termination) -> None:
    """Write the termination message, shortened to fit.

    An error changes nothing else: without the file, or on a full disk, only the message is lost.
    """
    if path is None:
        return
    text = fit(termination)
    try:
        # Kubernetes mounts this file itself: it can be written, but not replaced by a rename.
        with path.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        return


def fit(termination: Termination) -> str:
    """Render as JSON within the size limit: first shorten the output of the ranks, then drop the last ends."""
    keep = MAX_LAST_OUTPUT
    ends = termination.ends
    while True:
        cut = tuple(end.model_copy(update={"last_words": _tail(end.last_words, keep)}) for end in ends)
        text = termination.model_copy(update={"ends": cut}).to_json()
        if len(text.encode()) <= MAX_MESSAGE_BYTES:
            return text
        if keep > 200:
            keep //= 2
        else:
            ends = ends[: max(1, len(ends) // 2)]
            keep = keep if len(ends) > 1 else keep // 2


def _tail(text: str, num_characters: int) -> str:
    return text[-num_characters:] if num_characters else ""
