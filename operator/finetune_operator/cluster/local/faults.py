"""Preemptions and deaths on demand: `--preempt 'rank=1,at-step=40'`, `--kill 'rank=0,at-state=Saving'`. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from finetune_contract.heartbeat import RankReport, RankState


class FaultKind(StrEnum):
    """What is done to a pod."""

    PREEMPT = "preempt"
    """Taken away with notice."""
    KILL = "kill"
    """Gone at once, as with its node."""
    ROOM = "room"
    """From then on there is room for so many pods; those beyond are taken away with notice."""


@dataclass(frozen=True)
class Fault:
    """Something that is done once to the pod of a rank."""

    kind: FaultKind
    rank: int
    """Whose pod it is done to. With ROOM: the number of pods."""
    at_step: int | None = None
    """As soon as so many steps are finished."""
    at_state: RankState | None = None
    """As soon as the rank reports this state."""

    def is_due(self, reports: Iterable[RankReport]) -> bool:
        """Say whether what the ranks report is what it waits for."""
        if self.at_step is not None:
            return any(report.step is not None and report.step >= self.at_step for report in reports)
        return any(report.rank == self.rank and report.state is self.at_state for report in reports)

    def __str__(self) -> str:
        moment = f"step {self.at_step}" if self.at_step is not None else f"state {self.at_state}"
        whom = f"for {self.rank} pods" if self.kind is FaultKind.ROOM else f"of rank {self.rank}"
        return f"{self.kind} {whom} at {moment}"


EXAMPLE = "rank=1,at-step=40"


def parse_fault(kind: FaultKind, text: str) -> Fault:
    """Read what follows `--preempt` or `--kill`.

    Raises:
        ValueError: with a sentence that says what to write.
    """
    values = dict(part.strip().partition("=")[::2] for part in text.split(","))
    unknown = sorted(set(values) - {"rank", "at-step", "at-state"})
    if unknown:
        raise ValueError(f"--{kind} knows no {unknown[0]!r}: write rank and at-step (or at-state), e.g. {EXAMPLE!r}")
    if "rank" not in values or ("at-step" in values) == ("at-state" in values):
        raise ValueError(f"--{kind} {text!r}: give rank and one of at-step and at-state, e.g. {EXAMPLE!r}")
    rank = _count(kind, "rank", values["rank"])
    if "at-step" in values:
        return Fault(kind, rank, at_step=_count(kind, "at-step", values["at-step"]))
    states = {state.lower(): state for state in RankState}
    state = states.get(values["at-state"].lower())
    if state is None:
        raise ValueError(f"--{kind}: at-state={values['at-state']!r} is none of {', '.join(RankState)}")
    return Fault(kind, rank, at_state=state)


ROOM_EXAMPLE = "nodes=1,at-step=40"


def parse_room(text: str) -> Fault:
    """Read what follows `--room`.

    Raises:
        ValueError: with a sentence that says what to write.
    """
    values = dict(part.strip().partition("=")[::2] for part in text.split(","))
    if set(values) != {"nodes", "at-step"}:
        raise ValueError(f"--room {text!r}: give nodes and at-step, e.g. {ROOM_EXAMPLE!r}")
    nodes, step = (_count(FaultKind.ROOM, name, values[name]) for name in ("nodes", "at-step"))
    return Fault(FaultKind.ROOM, nodes, at_step=step)


def _count(kind: FaultKind, name: str, text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"--{kind}: {name}={text!r} is not a whole number, e.g. {EXAMPLE!r}")
    return int(text)
