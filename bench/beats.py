"""The coordinator under the beats of thousands of supervisors, over TLS, with tokens that a real API server reviews.

    python -m bench.beats [--jobs 1000] [--nodes-per-job 4] [--seconds 60]

Each supervisor keeps a connection and beats as often as the coordinator asks, with another step each time. Measured:
the operator's share of a core, all that it does included, and the time from a beat to its answer. The last line is
JSON.
"""

from __future__ import annotations

import asyncio
import gc
import time
from statistics import quantiles

import psutil

from bench.scale import Bench, parser, requests, run, supervisors
from bench.supervisors import Tally
from testing.operator.harness import OperatorProcess, running
from testing.operator.heartbeats import tls_context

CONNECT_SECONDS = 20.0
"""Over so long the supervisors' first beats are spread, as the starts of their pods would be."""

OWN_SECONDS = 0.01
"""Time between two looks at the bench's own loop."""


async def measure(bench: Bench, operator: OperatorProcess, seconds: float) -> dict[str, object]:
    """All measurements."""
    namespace = bench.control_plane.create_namespace("beats")
    await bench.create_jobs(namespace)
    tally, context = Tally(), tls_context(bench.control_plane)
    with running(operator):
        assert operator.process is not None
        process = psutil.Process(operator.process.pid)
        await bench.wait("all pods are created", lambda: bench.count(namespace, bench.pods_in_all))
        bench.say("all pods are created; tokens for their supervisors")
        all_of_them = await supervisors(bench, await bench.pods(namespace), tally, steady=False)
        bench.say("the supervisors begin to beat")
        tasks = [
            asyncio.create_task(one.run(operator.coordinator_port, context, CONNECT_SECONDS)) for one in all_of_them
        ]

        async def settled() -> bool:
            return all(one.sequence > 2 for one in all_of_them)

        await bench.wait("all supervisors beat", settled)
        bench.say("all beat regularly; measuring")
        # Pauses of this process are none of the operator's.
        gc.collect()
        gc.disable()
        own: list[float] = []
        watch = asyncio.create_task(own_delays(own))
        refused_at_first = tally.refused
        tally.latencies.clear()
        before, writes = process.cpu_times(), sum(requests(operator, writes_only=True).values())
        started = time.monotonic()
        await asyncio.sleep(seconds)
        after, elapsed = process.cpu_times(), time.monotonic() - started
        writes = sum(requests(operator, writes_only=True).values()) - writes
        rate = len(tally.latencies) / elapsed
        cores = (after.user + after.system - before.user - before.system) / elapsed
        for task in (*tasks, watch):
            if task.done():
                task.result()
            task.cancel()
        await asyncio.gather(*tasks, watch, return_exceptions=True)
        rss = process.memory_info().rss / 2**20
    p50, p99 = (1000 * quantiles(tally.latencies, n=100)[at] for at in (49, 98))
    own_p99 = 1000 * quantiles(own, n=100)[98]
    bench.note("supervisors", f"{len(tasks)}, each every {all_of_them[0].beat_seconds:g} s: {rate:.0f} beats/s")
    bench.note("operator", f"{100 * cores:.0f} % of a core, {rss:.0f} MiB")
    bench.note("answer after", f"p50 {p50:.1f} ms, p99 {p99:.1f} ms, max {1000 * max(tally.latencies):.0f} ms")
    bench.note("of that, the bench's own", f"p99 {own_p99:.1f} ms, max {1000 * max(own):.0f} ms: its loop was busy")
    bench.note("refused", f"{tally.refused - refused_at_first} ({refused_at_first} before all was warm)")
    bench.note("writes to the API server", f"{writes / elapsed:.1f} per second")
    return {
        "supervisors": len(tasks),
        "beats_per_second": round(rate),
        "cores": round(cores, 3),
        "p99_ms": round(p99, 1),
        "rss_mib": round(rss),
        "writes_per_second": round(writes / elapsed, 1),
    }


async def own_delays(found: list[float]) -> None:
    """How late this process itself is, again and again, for ever: a part of every answer's time."""
    while True:
        started = time.monotonic()
        await asyncio.sleep(OWN_SECONDS)
        found.append(time.monotonic() - started - OWN_SECONDS)


async def main() -> None:
    """Read the command line, and measure."""
    options_of = parser("bench.beats", __doc__)
    options_of.add_argument("--seconds", type=float, default=60.0, help="time of the measurement (default: 60)")
    options = options_of.parse_args()

    async def measured(bench: Bench, operator: OperatorProcess) -> dict[str, object]:
        return await measure(bench, operator, options.seconds)

    await run(options, {"kube-controller-manager"}, measured)


if __name__ == "__main__":
    asyncio.run(main())
