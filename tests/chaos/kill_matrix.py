"""The kill matrix: every fault, at every rank, at every stage, on real processes. Does each end well, or say why not?

Each cell is a small job of two ranks on the local cluster with the real reconcile. At the stage the ranks stop and
tell so; the fault is done to the very processes, disks or connections; then they go on. A cell is right where the job
succeeds with the bytes of the undisturbed run and the ledger names the cause, or where it fails (the fault stays) and
says why.

Wants root, for small disks, packet filters and memory limits. The last line is JSON: {"cells", "wrong",
"in_place_seconds", "whole_gang_seconds"}; the seconds are medians from the fault to the first step after it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from testing.measure.report import finish
from tests.chaos.matrix.cells import FAULTS, STAGES, TARGETS, Cell, all_cells, meaningless, verdict
from tests.chaos.matrix.run import Bed, MomentMissedError, Outcome, median

TIMED = tuple(
    Cell(fault, target, "training")
    for fault, target in (
        ("SIGKILL", "rank 0"),
        ("SIGKILL", "rank 1"),
        ("SIGKILL", "supervisor"),
        ("notice", "rank 1"),
    )
)
"""Faults after which pods can be kept: done twice, once in place and once with the whole gang anew."""
WAITING_AT_ONCE = 3


def choose(args: argparse.Namespace) -> list[Cell]:
    """The cells that the command line asks for."""
    return [
        cell
        for cell in all_cells()
        if cell.fault in args.faults and cell.target in args.ranks and cell.stage in args.stages
    ]


async def run_cells(bed: Bed, cells: Sequence[Cell], jobs: int) -> tuple[list[list[object]], int]:
    """Run cells; return the rows of the table, in the order of the cells, and how many are wrong."""
    rows: dict[Cell, list[object]] = {}
    wrong: list[str] = []

    async def run_one(cell: Cell, turns: asyncio.Semaphore) -> None:
        async with turns:
            try:
                outcome = await bed.run(cell)
                fault = verdict(cell, outcome.status, outcome.same_weights)
            except (MomentMissedError, OSError) as error:
                outcome, fault = Outcome({}, None, 0.0, None, None), str(error)
        if fault:
            wrong.append(cell.name)
        rows[cell] = row(cell, outcome, fault)
        print(f"  {len(rows)}/{len(cells)} {cell.name}: {outcome.seconds:.1f} s, {fault or 'right'}", flush=True)

    for cell in cells:
        if reason := meaningless(cell):
            rows[cell] = [cell.fault, cell.target, cell.stage, f"not run: {reason}", "", "", "", "", ""]
    # Where only time can show the fault, several cells wait side by side.
    for waits, at_once in ((False, jobs), (True, max(jobs, WAITING_AT_ONCE))):
        turns = asyncio.Semaphore(at_once)
        chosen = [cell for cell in cells if cell not in rows and cell.stands_still is waits]
        await asyncio.gather(*(run_one(cell, turns) for cell in chosen))
    return [rows[cell] for cell in cells], len(wrong)


def row(cell: Cell, outcome: Outcome, wrong: str) -> list[object]:
    """One line of the table."""
    status = outcome.status
    attempts = status.get("attempts", [])
    first = attempts[0].get("reason", "-") if attempts else "-"
    end = f"Failed ({status.get('reason')})" if status.get("phase") == "Failed" else str(status.get("phase"))
    seen = "" if outcome.fault_to_end_seen is None else f"{outcome.fault_to_end_seen:.1f}"
    lost = status.get("lostSteps", 0)
    return [cell.fault, cell.target, cell.stage, end, first, len(attempts) - 1, lost, seen, wrong or "right"]


async def time_restarts(folder: Path) -> tuple[float | None, float | None]:
    """Median seconds from fault to first step, in place and with a whole gang."""
    bed = Bed(folder)
    await bed.run(None)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for cell in TIMED:
        for in_place in (True, False):
            outcome = await bed.run(cell, in_place=in_place)
            how = "in place" if in_place else "whole gang"
            print(f"  {cell.name}, {how}: {outcome.fault_to_step or 0:.1f} s to the first new step", flush=True)
            if outcome.fault_to_step is not None:
                seconds[in_place].append(outcome.fault_to_step)
    bed.close()
    assert seconds[True] and seconds[False], "no run ever went on"
    return median(seconds[True]), median(seconds[False])


async def run_all(args: argparse.Namespace, folder: Path) -> tuple[list[list[object]], dict[str, object]]:
    """Run what is asked for."""
    began = time.monotonic()
    (folder / "timed").mkdir()
    bed = Bed(folder)
    truth = await bed.run(None)
    print(f"  undisturbed: {truth.seconds:.1f} s, weights {bed.truth[:12]}", flush=True)
    rows, num_wrong = await run_cells(bed, choose(args), args.jobs)
    bed.close()
    in_place, whole_gang = (None, None) if args.no_times else await time_restarts(folder / "timed")
    print(f"  {time.monotonic() - began:.0f} s in all", flush=True)
    num_cells = sum(line[-1] != "" for line in rows)
    result: dict[str, object] = {
        "cells": num_cells,
        "wrong": num_wrong,
        "in_place_seconds": in_place,
        "whole_gang_seconds": whole_gang,
    }
    return rows, result


HEADER = ("fault", "target", "stage", "end", "cause of attempt 1", "restarts", "lost steps", "seen after s", "verdict")


def words(known: Sequence[str]) -> dict[str, object]:
    """Options of an argument that takes some of known words."""
    return {"nargs": "+", "choices": known, "default": known, "metavar": "NAME"}


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--faults", **words(FAULTS), help=f"of {', '.join(FAULTS)}")  # type: ignore[arg-type]
    parser.add_argument("--ranks", **words(TARGETS), help=f"of {', '.join(TARGETS)}")  # type: ignore[arg-type]
    parser.add_argument("--stages", **words(STAGES), help=f"of {', '.join(STAGES)}")  # type: ignore[arg-type]
    parser.add_argument("--jobs", type=int, default=2, help="cells at once (default 2); those that wait: 3 at least")
    parser.add_argument("--no-times", action="store_true", help="leave the seconds of restarts out")
    args = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("the kill matrix wants root: it mounts small disks and puts filters on connections")
    with tempfile.TemporaryDirectory(prefix="kill-matrix-") as folder:
        rows, result = asyncio.run(run_all(args, Path(folder)))
    finish(HEADER, rows, result)
    if result["wrong"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
