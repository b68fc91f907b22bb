"""Which checkpoints may go. Pure; called by the store once a newer one was verified."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Retention:
    """What stays.

    Attributes:
        keep: the newest so many.
        every_steps: besides, the first at or behind each multiple of so many steps.
        best: besides, the one of the best validation.
    """

    keep: int = 3
    every_steps: int | None = None
    best: bool = False


def removable(
    kept: Iterable[tuple[int, int]], newest: tuple[int, int], retention: Retention, best_step: int | None
) -> list[tuple[int, int]]:
    """The checkpoints that may go, the newest of them first.

    Args:
        kept: (step, attempt) of all that are there.
        newest: (step, attempt) of the one that was verified just now. Newer ones were found damaged, or are of a
            superseded attempt: they do not count, and are not touched.
        best_step: step of the best validation so far.
    """
    older = sorted((entry for entry in kept if entry < newest), reverse=True)
    stay = set(older[: retention.keep - 1])
    if retention.every_steps is not None:
        stay |= _milestones([*older, newest], retention.every_steps)
    if retention.best and best_step is not None:
        # Of several attempts at one step the newest is what training went on from.
        stay |= set([entry for entry in older if entry[0] == best_step][:1])
    return [entry for entry in older if entry not in stay]


def _milestones(entries: list[tuple[int, int]], every_steps: int) -> set[tuple[int, int]]:
    """The first checkpoint at or behind each multiple."""
    first: dict[int, tuple[int, int]] = {}
    for entry in sorted(entries, reverse=True):
        first[entry[0] // every_steps] = entry
    return {entry for multiple, entry in first.items() if multiple > 0}
