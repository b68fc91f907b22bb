"""`python -m tests.simulation --events 1000000 --seed 7`: many episodes, one after the other.

Prints progress, a table, and JSON as the last line. A broken invariant ends the run with the command that replays it.
Exit code 1: the run did not contain everything that it must test (`missing`).
"""

from __future__ import annotations

import argparse
import sys
import time

from testing.measure.report import finish
from testing.simulated.faults import FAULTS
from testing.simulated.model import BrokenInvariantError
from tests.simulation.episode import COVERED, EpisodeResult, run_episode

EPISODE_EVENTS = 20_000
"""Number of events after which an episode injects no more faults."""
PROGRESS_SECONDS = 5.0


def missing(total: EpisodeResult) -> list[str]:
    """Return what a long run must contain and this one did not."""
    faults = {fault.inject.__name__ for fault in FAULTS}
    return sorted((COVERED - set(total.counts)) | (faults - set(total.faults)))


def run(num_events: int, seed: int, only: int | None = None) -> EpisodeResult:
    """Run episodes until this number of events has happened.

    Raises:
        BrokenInvariantError: an invariant is broken; the command to replay it is printed first.
    """
    total = EpisodeResult()
    began = printed = time.monotonic()
    number = 0 if only is None else only
    while total.num_events < num_events:
        try:
            total.add(run_episode(f"{seed}-{number}", EPISODE_EVENTS))
        except Exception as error:
            replay = f"python -m tests.simulation --seed {seed} --episode {number}"
            kind = "broken invariant" if isinstance(error, BrokenInvariantError) else "error"
            print(f"{kind}: {error}\nto replay: {replay}", file=sys.stderr, flush=True)
            raise
        number += 1
        if only is not None:
            break
        if time.monotonic() - printed > PROGRESS_SECONDS:
            printed = time.monotonic()
            rate = total.num_events / (printed - began)
            print(f"  {total.num_events:,} events in {number} episodes, {rate:,.0f} per second", flush=True)
    return total


def main() -> None:
    """Parse the arguments, run the episodes and print the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--events", type=int, default=1_000_000, help="number of events (default 1,000,000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all episodes (default 0)")
    parser.add_argument("--episode", type=int, default=None, help="run only this episode of the seed")
    args = parser.parse_args()
    began = time.monotonic()
    total = run(args.events, args.seed, args.episode)
    seconds = time.monotonic() - began
    rows: list[list[object]] = [["fault", name, count] for name, count in sorted(total.faults.items())]
    rows += [["observed", name, count] for name, count in sorted(total.counts.items())]
    result: dict[str, object] = {
        "events": total.num_events,
        "passes": total.num_reconciles,
        "virtual_days": round(total.virtual_seconds / 86400, 1),
        "seconds": round(seconds, 1),
        "events_per_second": round(total.num_events / seconds),
        "broken": 0,
        "missing": [] if args.episode is not None else missing(total),
    }
    finish(["", "what", "count"], rows, result)
    sys.exit(1 if result["missing"] else 0)


if __name__ == "__main__":
    main()
