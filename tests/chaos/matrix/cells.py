"""The cells of the matrix, and what each may end with. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

FAULTS = ("notice", "SIGKILL", "hang", "memory", "exit 1", "full disk", "read-only", "partition")
TARGETS = ("rank 0", "rank 1", "supervisor", "all")
STAGES = ("loading", "caching", "first step", "training", "saving", "validating", "exporting")
DISK = ("full disk", "read-only")
NOTICES = frozenset({"TerminationByKubelet", "NoticeSaved", "Preempted"})
LOST = frozenset({"PodLost", "NodeLost"})
NOT_SAVED = frozenset({"StorageError", "CheckpointStale"})
FAILED = frozenset({"MaxFailuresExceeded", "SameStepFailures"})
DISK_WORDS = {"full disk": "no space left", "read-only": "read-only"}


@dataclass(frozen=True)
class Cell:
    """One fault, done to one target at one stage."""

    fault: str
    target: str
    stage: str

    @property
    def name(self) -> str:
        """As in the table."""
        return f"{self.fault} x {self.target} x {self.stage}"

    @property
    def victims(self) -> tuple[int, ...]:
        """Ranks that are hit, or whose supervisor is."""
        return {"rank 0": (0,), "rank 1": (1,), "supervisor": (1,), "all": (0, 1)}[self.target]

    @property
    def aimed(self) -> tuple[int, ...]:
        """Ranks that stop at the stage. Inside a save the one that saves is among them, whoever is hit."""
        return (0, *(rank for rank in self.victims if rank)) if self.stage == "saving" else self.victims

    @property
    def stands_still(self) -> bool:
        """Whether only the passing of time can show the fault."""
        return self.fault in {"hang", "partition"}

    @property
    def keeps_every_step(self) -> bool:
        """Whether somebody holds the state of the last step and lives, or has the time to save it."""
        return self.fault == "notice" or (self.fault in {"SIGKILL", "exit 1", "memory"} and self.target != "all")

    @property
    def stays(self) -> bool:
        """Whether the fault is there for every attempt, so that the job must fail and say why."""
        return self.fault in DISK and self.target == "all"


def all_cells() -> list[Cell]:
    """Every cell."""
    return [Cell(*names) for names in product(FAULTS, TARGETS, STAGES)]


def meaningless(cell: Cell) -> str | None:
    """Why there is nothing to see in a cell; None where there is."""
    if cell.fault in DISK and cell.target == "rank 1" and cell.stage != "caching":
        return "only rank 0 writes then"
    return None


def reasons(cell: Cell) -> frozenset[str]:
    """Reasons that the ledger may give for the end of the first attempt; empty: any."""
    by_fault = {
        # A supervisor that nobody tells why may be gone before its last words are read.
        "notice": NOTICES | LOST if cell.target == "supervisor" else NOTICES,
        "SIGKILL": LOST if cell.target == "all" else frozenset({"ProcessFailed"}),
        "hang": frozenset({"Hang"}) if cell.target != "supervisor" else LOST,
        "memory": frozenset({"OutOfMemory"}) if cell.target != "supervisor" else frozenset({"ProcessFailed"}),
        "exit 1": frozenset({"ProcessFailed"}),
        "full disk": NOT_SAVED,
        "read-only": NOT_SAVED,
        "partition": frozenset({"Hang", "FabricError"}) | LOST,
    }
    return by_fault[cell.fault]


def may_pass(cell: Cell) -> bool:
    """Whether the first attempt may come to its end in spite of the fault."""
    # Training does not need the operator, nor a supervisor that answers, nor the disk that these two write to.
    if cell.stage == "exporting" and (cell.fault == "notice" or cell.target in {"rank 1", "supervisor"}):
        # All is trained and committed, and rank 0 alone writes the outputs: they may be there before the fault is seen.
        return True
    if cell.fault in DISK:
        # Training goes on and saves again once the disk takes it.
        return not cell.stays
    return cell.target == "supervisor" and cell.fault in {"partition", "hang", *DISK}


def verdict(cell: Cell, status: dict[str, Any], same_weights: bool | None) -> str:
    """What is wrong with an end; empty where it is right.

    Args:
        cell: the cell.
        status: of the job at its end.
        same_weights: whether the output is that of the undisturbed run; None: there is none.
    """
    if cell.stays:
        return _failed_rightly(cell, status)
    if status.get("phase") != "Succeeded":
        return f"{status.get('phase')}: {str(status.get('message'))[-300:]}"
    if not same_weights:
        return "other weights"
    if cell.keeps_every_step and status.get("lostSteps"):
        return f"{status['lostSteps']} steps lost"
    return _wrong_cause(cell, status)


def _wrong_cause(cell: Cell, status: dict[str, Any]) -> str:
    attempts = status.get("attempts", [])
    first = attempts[0].get("reason") if attempts else None
    if first in {None, "Finished"}:
        return "" if may_pass(cell) else "the fault did nothing"
    if first not in reasons(cell):
        words = str(attempts[0].get("message")).strip().splitlines() or [""]
        return f"attempt 1 ended because of {first}: {words[-1][:200]}"
    return ""


def _failed_rightly(cell: Cell, status: dict[str, Any]) -> str:
    attempts, message = status.get("attempts", []), str(status.get("message"))
    if status.get("phase") != "Failed" or status.get("reason") not in FAILED | reasons(cell):
        return f"{status.get('phase')} ({status.get('reason')})"
    wrong = [entry.get("reason") for entry in attempts if entry.get("reason") not in reasons(cell)]
    if wrong:
        return f"an attempt ended because of {wrong[0]}"
    return "" if DISK_WORDS[cell.fault] in message.lower() else f"its message does not say it: {message}"
