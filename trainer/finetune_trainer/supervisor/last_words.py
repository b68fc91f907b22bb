"""The pod's last words: which rank ended the pod, with what code and what it last said."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import MAX_LAST_WORDS, RankEnd, Termination

MAX_MESSAGE_BYTES = 4096
"""Kubernetes keeps so much of a termination message."""
FINE = frozenset({ExitCode.DONE, ExitCode.SAVED})


def cause_first(ends: Sequence[RankEnd]) -> tuple[RankEnd, ...]:
    """Order ends by what explains most: bad ones before good ones, a lost peer (a consequence) behind other faults.

    Within that, in the order in which they came.
    """

    def weight(end: RankEnd) -> int:
        if end.exit_code in FINE:
            return 2
        return 1 if end.exit_code == ExitCode.FABRIC else 0

    return tuple(sorted(ends, key=weight))


def pod_exit_code(ends: Sequence[RankEnd]) -> int:
    """Exit code of the pod: that of the first rank that ended badly; SAVED where any saved; else DONE."""
    first = cause_first(ends)[0]
    if first.exit_code not in FINE:
        return first.exit_code
    return ExitCode.SAVED if any(end.exit_code == ExitCode.SAVED for end in ends) else ExitCode.DONE


def write_termination(path: Path | None, termination: Termination) -> None:
    """Write the last words, shortened until they fit. A pod without the file, or a full disk, loses only the words."""
    if path is None:
        return
    text = fit(termination)
    try:
        # Kubernetes mounts this very file: it cannot be renamed over, only written.
        with path.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        return


def fit(termination: Termination) -> str:
    """Render as JSON within the size that Kubernetes keeps: words are cut first, then the least telling ranks."""
    keep = MAX_LAST_WORDS
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
