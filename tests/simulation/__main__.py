"""`python -m tests.simulation --events 1000000 --seed 7`: many episodes, one after the other.

Prints progress, a table, and JSON as the last line. A broken invariant ends it with the command that shows it again.
"""

from __future__ import annotations

import argparse
import sys
import time

from testing.measure.report import finish
from testing.simulated.model import BrokenInvariantError
from tests.simulation.episode import Result, run_episode

EPISODE_EVENTS = 20_000
"""Events after which an episode grows calm."""
PROGRESS_SECONDS = 5.0


def run(num_events: int, seed: int, only: int | None = None) -> Result:
    """Run episodes until so many events have happened.

    Raises:
        SystemExit: an invariant is broken; its message has the replay.
    """
    total = Result()
    began = told = time.monotonic()
    number = 0 if only is None else only
    while total.num_events < num_events:
        try:
            total.add(run_episode(f"{seed}-{number}", EPISODE_EVENTS))
        except Exception as error:
            replay = f"python -m tests.simulation --seed {seed} --episode {number}"
            what = "broken" if isinstance(error, BrokenInvariantError) else "error"
            print(f"{what}: {error}\nreplay: {replay}", file=sys.stderr, flush=True)
            raise
        number += 1
        if only is not None:
            break
        if time.monotonic() - told > PROGRESS_SECONDS:
            told = time.monotonic()
            rate = total.num_events / (told - began)
            print(f"  {total.num_events:,} events in {number} episodes, {rate:,.0f} a second", flush=True)
    return total


def main() -> None:
    """Read the arguments, run, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--events", type=int, default=1_000_000, help="events in all (default 1,000,000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (default 0)")
    parser.add_argument("--episode", type=int, default=None, help="run only this episode of the seed")
    args = parser.parse_args()
    began = time.monotonic()
    total = run(args.events, args.seed, args.episode)
    seconds = time.monotonic() - began
    rows: list[list[object]] = [["faults", name, count] for name, count in sorted(total.faults.items())]
    rows += [["seen", name, count] for name, count in sorted(total.counts.items())]
    result = {
        "events": total.num_events,
        "passes": total.num_passes,
        "virtual_days": round(total.virtual_seconds / 86400, 1),
        "seconds": round(seconds, 1),
        "events_per_second": round(total.num_events / seconds),
        "broken": 0,
    }
    finish(["", "what", "how often"], rows, result)


if __name__ == "__main__":
    main()
