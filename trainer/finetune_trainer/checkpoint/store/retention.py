"""Selects the checkpoints to remove. Pure; the store calls it after a newer checkpoint was verified."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Retention:
    """The rules for the checkpoints to keep.

    Attributes:
        keep: number of newest checkpoints to keep.
        every_steps: also keep the first checkpoint at or after each multiple of this number of steps.
        best: also keep the checkpoint of the best validation.
    """

    keep: int = 3
    every_steps: int | None = None
    best: bool = False


def removable(
    kept: Iterable[tuple[int, int]], newest: tuple[int, int], retention: Retention, best_step: int | None
) -> list[tuple[int, int]]:
    """Return the checkpoints to remove, newest first.

    Args:
        kept: (step, attempt) of all existing checkpoints.
        newest: (step, attempt) of the checkpoint that was verified just now. Newer ones are damaged, or are from a
            superseded attempt: they do not count and are not removed.
        retention: which checkpoints to keep.
        best_step: step of the best validation so far.
    """
    older = sorted((entry for entry in kept if entry < newest), reverse=True)
    stay = set(older[: retention.keep - 1])
    if retention.every_steps is not None:
        stay |= _milestones([*older, newest], retention.every_steps)
    if retention.best and best_step is not None:
        # If several attempts saved this step, training continued from the newest one.
        stay |= set([entry for entry in older if entry[0] == best_step][:1])
    return [entry for entry in older if entry not in stay]


def _milestones(entries: list[tuple[int, int]], every_steps: int) -> set[tuple[int, int]]:
    """Return the first checkpoint at or after each multiple of `every_steps`."""
    first: dict[int, tuple[int, int]] = {}
    for entry in sorted(entries, reverse=True):
        first[entry[0] // every_steps] = entry
    return {entry for multiple, entry in first.items() if multiple > 0}
