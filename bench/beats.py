"""Benchmark of the coordinator with thousands of supervisors, over TLS, with tokens that a real API server reviews.

    python -m bench.beats [--jobs 1000] [--nodes-per-job 4] [--seconds 60]

Each supervisor keeps a connection open and sends heartbeats at the interval that the coordinator requests, each with
another step. Measured: the operator's use of a CPU core, including its other work, and the time from a heartbeat to its
reply. The last line is JSON.
"""

from __future__ import annotations

import asyncio
import gc
import time
from statistics import quantiles

import psutil

from bench.scale import OperatorBench, count_requests, create_parser, create_supervisors, run_bench
from bench.supervisors import HeartbeatCounts
from testing.operator.harness import OperatorProcess, running
from testing.operator.heartbeats import tls_context

CONNECT_SECONDS = 20.0
"""Period over which the supervisors' first heartbeats are spread, like the starts of their pods."""

OWN_SECONDS = 0.01
"""Interval between two measurements of the delay of this process's own event loop."""


async def measure(bench: OperatorBench, operator: OperatorProcess, seconds: float) -> dict[str, object]:
    """Run all measurements."""
    await bench.create_jobs("beats")
    counts, context = HeartbeatCounts(), tls_context(bench.control_plane)
    with running(operator):
        assert operator.process is not None
        process = psutil.Process(operator.process.pid)
        await bench.wait("all pods are created", lambda: bench.has_pods(bench.total_pods))
        bench.print_status("all pods are created; requesting tokens for their supervisors")
        supervisors = await create_supervisors(bench, await bench.pods(), counts, steady=False)
        bench.print_status("the supervisors start to send heartbeats")
        tasks = [
            asyncio.create_task(supervisor.run(operator.coordinator_port, context, CONNECT_SECONDS))
            for supervisor in supervisors
        ]

        async def settled() -> bool:
            return all(supervisor.sequence > 2 for supervisor in supervisors)

        await bench.wait("all supervisors send heartbeats", settled)
        bench.print_status("all supervisors send heartbeats regularly; measuring")
        # Garbage collection of this process must not count as latency of the operator.
        gc.collect()
        gc.disable()
        own: list[float] = []
        watch = asyncio.create_task(own_delays(own))
        refused_at_first = counts.refused
        counts.latencies.clear()
        before, writes = process.cpu_times(), sum(count_requests(operator, writes_only=True).values())
        started = time.monotonic()
        await asyncio.sleep(seconds)
        after, elapsed = process.cpu_times(), time.monotonic() - started
        writes = sum(count_requests(operator, writes_only=True).values()) - writes
        rate = len(counts.latencies) / elapsed
        cores = (after.user + after.system - before.user - before.system) / elapsed
        for task in (*tasks, watch):
            if task.done():
                task.result()
            task.cancel()
        await asyncio.gather(*tasks, watch, return_exceptions=True)
        rss = process.memory_info().rss / 2**20
    p50, p99 = (1000 * quantiles(counts.latencies, n=100)[at] for at in (49, 98))
    own_p99 = 1000 * quantiles(own, n=100)[98]
    interval = supervisors[0].beat_seconds
    bench.add_row("supervisors", f"{len(tasks)}, each every {interval:g} s: {rate:.0f} heartbeats/s")
    bench.add_row("operator", f"{100 * cores:.0f} % of a core, {rss:.0f} MiB")
    bench.add_row("reply after", f"p50 {p50:.1f} ms, p99 {p99:.1f} ms, max {1000 * max(counts.latencies):.0f} ms")
    bench.add_row("of that, the benchmark's own delay", f"p99 {own_p99:.1f} ms, max {1000 * max(own):.0f} ms")
    bench.add_row("refused", f"{counts.refused - refused_at_first} ({refused_at_first} during the warm-up)")
    bench.add_row("writes to the API server", f"{writes / elapsed:.1f} per second")
    return {
        "supervisors": len(tasks),
        "beats_per_second": round(rate),
        "cores": round(cores, 3),
        "p99_ms": round(p99, 1),
        "rss_mib": round(rss),
        "writes_per_second": round(writes / elapsed, 1),
    }


async def own_delays(found: list[float]) -> None:
    """Measure continuously how late this process's event loop is: this is part of every reply's time."""
    while True:
        started = time.monotonic()
        await asyncio.sleep(OWN_SECONDS)
        found.append(time.monotonic() - started - OWN_SECONDS)


async def main() -> None:
    """Parse the command line and run the benchmark."""
    command_line = create_parser("bench.beats", __doc__)
    command_line.add_argument("--seconds", type=float, default=60.0, help="time of the measurement (default: 60)")
    options = command_line.parse_args()

    async def measured(bench: OperatorBench, operator: OperatorProcess) -> dict[str, object]:
        return await measure(bench, operator, options.seconds)

    await run_bench(options, {"kube-controller-manager"}, measured)


if __name__ == "__main__":
    asyncio.run(main())
