"""The kill matrix: injects every fault at every rank and stage into real processes, and checks the results.

Each cell is a small job of two ranks, of a method or of a script, on the local cluster with the real reconcile. The
ranks stop at the stage and report it. The fault is injected into the real processes, disks or connections, and the
ranks continue. A cell is correct if the job succeeds with the bytes of the undisturbed run and the ledger names the
cause. If the fault is permanent, the job must fail with a message that names it.

Needs root for small disks, packet filters and memory limits. The last line is JSON: {"cells", "wrong",
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
from tests.chaos.matrix.cells import FAULTS, JOBS, STAGES, TARGETS, Cell, all_cells, meaningless, verdict
from tests.chaos.matrix.run import CellResult, MatrixHarness, StageNotReachedError, median

TIMED = tuple(
    Cell(fault, target, "training")
    for fault, target in (
        ("SIGKILL", "rank 0"),
        ("SIGKILL", "rank 1"),
        ("SIGKILL", "supervisor"),
        ("notice", "rank 1"),
    )
)
"""Faults after which pods can be kept: injected twice, with a recovery in place and of the whole gang."""
NUM_WAITING = 3
"""Minimum number of parallel cells that wait for a timeout."""


def choose(args: argparse.Namespace) -> list[Cell]:
    """Return the cells that the command line selects."""
    if args.cells:
        return [cell for cell in all_cells() if cell.name in args.cells]
    return [
        cell
        for cell in all_cells()
        if cell.fault in args.faults
        and cell.target in args.ranks
        and cell.stage in args.stages
        and cell.job in args.kinds
    ]


async def run_cells(harness: MatrixHarness, cells: Sequence[Cell], jobs: int) -> tuple[list[list[object]], int]:
    """Run cells; return the rows of the table in the order of the cells, and the number of wrong cells."""
    rows: dict[Cell, list[object]] = {}
    wrong: list[str] = []

    async def run_one(cell: Cell, turns: asyncio.Semaphore) -> None:
        async with turns:
            try:
                result = await harness.run(cell)
                error_text = verdict(cell, result.status, result.same_weights)
            except (StageNotReachedError, OSError) as error:
                result, error_text = CellResult({}, None, 0.0, None, None), str(error) or type(error).__name__
        if error_text:
            wrong.append(cell.name)
        rows[cell] = row(cell, result, error_text)
        print(f"  {len(rows)}/{len(cells)} {cell.name}: {result.seconds:.1f} s, {error_text or 'correct'}", flush=True)

    for cell in cells:
        if reason := meaningless(cell):
            rows[cell] = [cell.job, cell.fault, cell.target, cell.stage, f"not run: {reason}", "", "", "", "", ""]
    # Cells whose fault only a timeout detects run in parallel.
    for needs_timeout, at_once in ((False, jobs), (True, max(jobs, NUM_WAITING))):
        turns = asyncio.Semaphore(at_once)
        chosen = [cell for cell in cells if cell not in rows and cell.needs_timeout is needs_timeout]
        await asyncio.gather(*(run_one(cell, turns) for cell in chosen))
    return [rows[cell] for cell in cells], len(wrong)


def row(cell: Cell, result: CellResult, error_text: str) -> list[object]:
    """Return one row of the table."""
    status = result.status
    attempts = status.get("attempts", [])
    first = attempts[0].get("reason", "-") if attempts else "-"
    end = f"Failed ({status.get('reason')})" if status.get("phase") == "Failed" else str(status.get("phase"))
    detection = "" if result.fault_to_detection is None else f"{result.fault_to_detection:.1f}"
    lost = status.get("lostSteps", 0)
    return [
        cell.job,
        cell.fault,
        cell.target,
        cell.stage,
        end,
        first,
        len(attempts) - 1,
        lost,
        detection,
        error_text or "correct",
    ]


async def time_restarts(folder: Path) -> tuple[float | None, float | None]:
    """Return the median seconds from the fault to the first step, in place and with the whole gang."""
    harness = MatrixHarness(folder)
    await harness.run(None)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for cell in TIMED:
        for in_place in (True, False):
            result = await harness.run(cell, in_place=in_place)
            how = "in place" if in_place else "whole gang"
            print(f"  {cell.name}, {how}: {result.fault_to_step or 0:.1f} s to the first new step", flush=True)
            if result.fault_to_step is not None:
                seconds[in_place].append(result.fault_to_step)
    harness.close()
    assert seconds[True] and seconds[False], "no run continued after its fault"
    return median(seconds[True]), median(seconds[False])


async def run_all(args: argparse.Namespace, folder: Path) -> tuple[list[list[object]], dict[str, object]]:
    """Run the selected cells and the timed restarts; return the rows of the table and the result."""
    began = time.monotonic()
    (folder / "timed").mkdir()
    harness = MatrixHarness(folder)
    cells = choose(args)
    for kind in sorted({cell.job for cell in cells}):
        undisturbed = await harness.run(None, kind=kind)
        weights = harness.references[kind]
        assert weights, f"the undisturbed {kind} wrote no weights: {undisturbed.status}"
        print(f"  undisturbed {kind}: {undisturbed.seconds:.1f} s, weights {weights[:12]}", flush=True)
    rows, num_wrong = await run_cells(harness, cells, args.jobs)
    harness.close()
    in_place, whole_gang = (None, None) if args.no_times else await time_restarts(folder / "timed")
    print(f"  total: {time.monotonic() - began:.0f} s", flush=True)
    num_cells = sum(line[-1] != "" for line in rows)
    result: dict[str, object] = {
        "cells": num_cells,
        "wrong": num_wrong,
        "in_place_seconds": in_place,
        "whole_gang_seconds": whole_gang,
    }
    return rows, result


HEADER = (
    "job",
    "fault",
    "target",
    "stage",
    "end",
    "cause of attempt 1",
    "restarts",
    "lost steps",
    "detected after s",
    "verdict",
)


def selection(names: Sequence[str]) -> dict[str, object]:
    """Return the options of an argument that selects some of these names."""
    return {"nargs": "+", "choices": names, "default": names, "metavar": "NAME"}


def main() -> None:
    """Run the matrix and print the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--faults", **selection(FAULTS), help=f"some of {', '.join(FAULTS)}")  # type: ignore[arg-type]
    parser.add_argument("--ranks", **selection(TARGETS), help=f"some of {', '.join(TARGETS)}")  # type: ignore[arg-type]
    parser.add_argument("--stages", **selection(STAGES), help=f"some of {', '.join(STAGES)}")  # type: ignore[arg-type]
    parser.add_argument("--kinds", **selection(JOBS), help="recipe, script, or both")  # type: ignore[arg-type]
    parser.add_argument("--cells", nargs="+", metavar="NAME", help="only these, e.g. 'script: notice x all x saving'")
    parser.add_argument("--jobs", type=int, default=2, help="parallel cells (default 2; at least 3 if they wait)")
    parser.add_argument("--no-times", action="store_true", help="do not measure the seconds of restarts")
    args = parser.parse_args()
    if unknown := set(args.cells or ()) - {cell.name for cell in all_cells()}:
        parser.error(f"unknown cells: {', '.join(sorted(unknown))}; a name is e.g. {all_cells()[0].name!r}")
    if os.geteuid() != 0:
        sys.exit("the kill matrix needs root: it mounts small disks and filters connections; run it with sudo")
    with tempfile.TemporaryDirectory(prefix="kill-matrix-") as folder:
        rows, result = asyncio.run(run_all(args, Path(folder)))
    finish(HEADER, rows, result)
    if result["wrong"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
