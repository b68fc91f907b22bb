"""Faults that the user plans: `--preempt 'rank=1,at-step=40'`, `--kill 'rank=0,at-state=Saving'`. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from finetune_contract.heartbeat import RankReport, RankState


class FaultKind(StrEnum):
    """Kind of a planned fault."""

    PREEMPT = "preempt"
    """Delete the pod with a preemption notice."""
    KILL = "kill"
    """Kill the pod without notice, as if its node failed."""
    ROOM = "room"
    """Limit the capacity to a number of pods. Excess pods are preempted with a notice."""


@dataclass(frozen=True)
class PlannedFault:
    """A fault that is triggered once for the pod of a rank."""

    kind: FaultKind
    rank: int
    """Rank whose pod is affected. With ROOM: the number of pods."""
    at_step: int | None = None
    """Trigger as soon as this number of steps is finished."""
    at_state: RankState | None = None
    """Trigger as soon as the rank reports this state."""

    def is_due(self, reports: Iterable[RankReport]) -> bool:
        """Return whether the reports of the ranks trigger the fault."""
        if self.at_step is not None:
            return any(report.step is not None and report.step >= self.at_step for report in reports)
        return any(report.rank == self.rank and report.state is self.at_state for report in reports)

    def __str__(self) -> str:
        moment = f"step {self.at_step}" if self.at_step is not None else f"state {self.at_state}"
        target = f"for {self.rank} pods" if self.kind is FaultKind.ROOM else f"of rank {self.rank}"
        return f"{self.kind} {target} at {moment}"


EXAMPLE = "rank=1,at-step=40"


def parse_fault(kind: FaultKind, text: str) -> PlannedFault:
    """Parse the value of `--preempt` or `--kill`.

    Raises:
        ValueError: the value is invalid; the message contains an example.
    """
    values = dict(part.strip().partition("=")[::2] for part in text.split(","))
    unknown = sorted(set(values) - {"rank", "at-step", "at-state"})
    if unknown:
        raise ValueError(
            f"--{kind}: unknown key {unknown[0]!r}; write rank and at-step (or at-state), e.g. {EXAMPLE!r}"
        )
    if "rank" not in values or ("at-step" in values) == ("at-state" in values):
        raise ValueError(f"--{kind} {text!r}: write rank and one of at-step and at-state, e.g. {EXAMPLE!r}")
    rank = _parse_count(kind, "rank", values["rank"])
    if "at-step" in values:
        return PlannedFault(kind, rank, at_step=_parse_count(kind, "at-step", values["at-step"]))
    states = {state.lower(): state for state in RankState}
    state = states.get(values["at-state"].lower())
    if state is None:
        raise ValueError(f"--{kind}: at-state={values['at-state']!r} is unknown; write one of {', '.join(RankState)}")
    return PlannedFault(kind, rank, at_state=state)


ROOM_EXAMPLE = "nodes=1,at-step=40"


def parse_room(text: str) -> PlannedFault:
    """Parse the value of `--room`.

    Raises:
        ValueError: the value is invalid; the message contains an example.
    """
    values = dict(part.strip().partition("=")[::2] for part in text.split(","))
    if set(values) != {"nodes", "at-step"}:
        raise ValueError(f"--room {text!r}: write nodes and at-step, e.g. {ROOM_EXAMPLE!r}")
    nodes, step = (_parse_count(FaultKind.ROOM, name, values[name]) for name in ("nodes", "at-step"))
    return PlannedFault(FaultKind.ROOM, nodes, at_step=step)


def _parse_count(kind: FaultKind, name: str, text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"--{kind}: {name}={text!r} is not a whole number, e.g. {EXAMPLE!r}")
    return int(text)
