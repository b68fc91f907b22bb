"""The cells of the matrix and their permitted results. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

FAULTS = ("notice", "SIGKILL", "hang", "memory", "exit 1", "full disk", "read-only", "partition", "XID")
TARGETS = ("rank 0", "rank 1", "supervisor", "all")
JOBS = ("recipe", "script")
"""What the ranks run: a method of the trainer, or a script under the hook."""
STAGES = ("loading", "caching", "first step", "training", "saving", "validating", "exporting")
SCRIPT_STAGES = tuple(stage for stage in STAGES if stage != "caching")
"""Stages of a job with a script: the script has its data."""
ALONE = frozenset({"saving", "validating"})
"""Stages in which rank 0 of a script works while the others wait for it."""
DISK = ("full disk", "read-only")
NOTICES = frozenset({"TerminationByKubelet", "NoticeSaved", "Preempted"})
LOST = frozenset({"PodLost", "NodeLost"})
NOT_SAVED = frozenset({"StorageError", "StorageUnavailable", "CheckpointStale"})
FAILED = frozenset({"MaxFailuresExceeded", "SameStepFailures"})
OUTAGE = "StorageUnavailable"
OUTAGES = 2
"""Attempts of a job that end because of an outage, before the disk of a permanent fault is repaired."""
DISK_MESSAGES = {"full disk": ("no space left", "are free; enlarge the volume"), "read-only": ("read-only",)}


@dataclass(frozen=True)
class Cell:
    """One fault, injected into one target at one stage of a job."""

    fault: str
    target: str
    stage: str
    job: str = "recipe"

    @property
    def name(self) -> str:
        """Name of the cell in the output."""
        return f"{self.job}: {self.fault} x {self.target} x {self.stage}"

    @property
    def victims(self) -> tuple[int, ...]:
        """Ranks that get the fault, or whose supervisor gets it."""
        return {"rank 0": (0,), "rank 1": (1,), "supervisor": (1,), "all": (0, 1)}[self.target]

    @property
    def stopped_ranks(self) -> tuple[int, ...]:
        """Ranks that stop at the stage. During a save, rank 0 always stops, because it writes the manifest."""
        is_alone = self.stage in ALONE if self.is_script else self.stage == "saving"
        return (0, *(rank for rank in self.victims if rank)) if is_alone else self.victims

    @property
    def continued_ranks(self) -> tuple[int, ...]:
        """Ranks that continue after the fault. A rank ends with its supervisor, at the stage of the cell."""
        is_killed = self.target == "supervisor" and self.fault in {"SIGKILL", "memory", "exit 1"}
        return tuple(rank for rank in self.stopped_ranks if not (is_killed and rank in self.victims))

    @property
    def is_script(self) -> bool:
        """Return whether the ranks run a script."""
        return self.job == "script"

    @property
    def needs_timeout(self) -> bool:
        """Return whether only a timeout can detect the fault."""
        return self.fault in {"hang", "partition"}

    @property
    def keeps_every_step(self) -> bool:
        """Return whether a surviving rank holds the state of the last step, or a rank has the time to save it."""
        return self.fault in {"notice", "XID"} or (
            self.fault in {"SIGKILL", "exit 1", "memory"} and self.target != "all"
        )

    @property
    def is_permanent(self) -> bool:
        """Return whether the fault affects every attempt.

        The job must fail with a message about it. If its attempts end because of an outage, which does not count
        towards `maxFailures`, it must wait for the repair.
        """
        # The map phase waits until a full disk has room.
        return self.fault in DISK and self.target == "all" and (self.fault, self.stage) != ("full disk", "caching")


def all_cells() -> list[Cell]:
    """Return all cells."""
    recipes = [Cell(*names) for names in product(FAULTS, TARGETS, STAGES)]
    return [*recipes, *(Cell(*names, "script") for names in product(FAULTS, TARGETS, SCRIPT_STAGES))]


def meaningless(cell: Cell) -> str | None:
    """Return why a cell tests nothing; None if it is useful."""
    # Rank 1 of a recipe writes parts of the cache; that of a script writes its random state into each checkpoint.
    writes = cell.stage != "exporting" if cell.is_script else cell.stage == "caching"
    if cell.fault in DISK and cell.target == "rank 1" and not writes:
        return "only rank 0 writes at this stage"
    if cell.fault == "XID" and cell.target == "supervisor":
        return "GPUs belong to ranks"
    return None


def reasons(cell: Cell) -> frozenset[str]:
    """Return the reasons that the ledger may give for the end of the first attempt."""
    by_fault = {
        # A supervisor can exit before its termination message is read.
        "notice": NOTICES | LOST if cell.target == "supervisor" else NOTICES,
        "SIGKILL": LOST if cell.target == "all" else frozenset({"ProcessFailed"}),
        "hang": frozenset({"Hang"}) if cell.target != "supervisor" else LOST,
        "memory": frozenset({"OutOfMemory"}) if cell.target != "supervisor" else frozenset({"ProcessFailed"}),
        "exit 1": frozenset({"ProcessFailed"}),
        "full disk": NOT_SAVED,
        "read-only": NOT_SAVED,
        "partition": frozenset({"Hang", "FabricError"}) | LOST,
        "XID": frozenset({"GpuFault"}),
    }
    return by_fault[cell.fault]


def may_succeed(cell: Cell) -> bool:
    """Return whether the first attempt may succeed in spite of the fault."""
    # Training needs neither the operator, nor a supervisor that responds, nor the disk that these two write to.
    if cell.stage == "exporting" and (cell.fault in {"notice", "XID"} or cell.target in {"rank 1", "supervisor"}):
        # Training is done, and only rank 0 writes the outputs: it can finish before the fault is detected.
        return True
    if cell.fault in DISK:
        # Training continues, and saves again when the disk accepts writes.
        return not cell.is_permanent
    return cell.target == "supervisor" and cell.fault in {"partition", "hang", *DISK}


def verdict(cell: Cell, status: dict[str, Any], same_weights: bool | None) -> str:
    """Return what is wrong with the result of a cell; empty if it is correct.

    Args:
        cell: the cell.
        status: status of the job at its end.
        same_weights: whether the output equals that of the undisturbed run; None: there is no output.
    """
    if cell.is_permanent and status.get("phase") == "Succeeded":
        return _check_outages(cell, status) if same_weights else "different weights"
    if cell.is_permanent:
        return _check_failure(cell, status)
    if status.get("phase") != "Succeeded":
        return f"{status.get('phase')}: {str(status.get('message'))[-300:]}"
    if not same_weights:
        return "different weights"
    if cell.keeps_every_step and status.get("lostSteps"):
        return f"{status['lostSteps']} steps lost"
    return _check_cause(cell, status)


def _check_cause(cell: Cell, status: dict[str, Any]) -> str:
    attempts = status.get("attempts", [])
    first = attempts[0].get("reason") if attempts else None
    if first in {None, "Finished"}:
        return "" if may_succeed(cell) else "the fault had no effect"
    if first not in reasons(cell):
        lines = str(attempts[0].get("message")).strip().splitlines() or [""]
        return f"attempt 1 ended with reason {first}: {lines[-1][:200]}"
    return ""


def _check_outages(cell: Cell, status: dict[str, Any]) -> str:
    outages = [entry for entry in status.get("attempts", []) if entry.get("reason") == OUTAGE]
    if len(outages) < OUTAGES:
        return f"the job succeeded after {len(outages)} outages"
    return next((text for entry in outages if (text := _check_message(cell, str(entry.get("message"))))), "")


def _check_failure(cell: Cell, status: dict[str, Any]) -> str:
    attempts, message = status.get("attempts", []), str(status.get("message"))
    if status.get("phase") != "Failed" or status.get("reason") not in FAILED | reasons(cell):
        return f"{status.get('phase')} ({status.get('reason')})"
    wrong = [entry.get("reason") for entry in attempts if entry.get("reason") not in reasons(cell)]
    if wrong:
        return f"an attempt ended with reason {wrong[0]}"
    return _check_message(cell, message)


def _check_message(cell: Cell, message: str) -> str:
    is_named = any(text in message.lower() for text in DISK_MESSAGES[cell.fault])
    return "" if is_named else f"the message does not name the fault: {message}"
