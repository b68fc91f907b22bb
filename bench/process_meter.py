"""Memory of the operator's process, and CPU time of all processes of a benchmark: they share the machine."""

from __future__ import annotations

from collections.abc import Iterable

import psutil

from testing.controlplane.process import Program
from testing.operator.harness import OperatorProcess

CpuTimes = dict[str, float]
"""CPU time by the name of the process."""


class ProcessMeter:
    """The programs of the control plane, the benchmark itself, and the operator if it runs."""

    def __init__(self, programs: Iterable[Program], operator: OperatorProcess | None = None) -> None:
        self._all = {program.name: psutil.Process(program.pid) for program in programs if program.pid}
        self._all["bench"] = psutil.Process()
        if operator is not None:
            assert operator.process is not None
            self._all["operator"] = psutil.Process(operator.process.pid)
        self.rss_mib = 0.0

    def cpu_seconds(self) -> CpuTimes:
        """Return the CPU seconds of each process so far. Notes the operator's memory, too."""
        if "operator" in self._all:
            self.rss_mib = max(self.rss_mib, self._all["operator"].memory_info().rss / 2**20)
        return {name: sum(process.cpu_times()[:2]) for name, process in self._all.items()}

    def cpu_ms_since(self, before: CpuTimes, num_jobs: int) -> CpuTimes:
        """Return the CPU time of each process since an earlier call of `cpu_seconds`, in ms per job."""
        return {name: 1000 * (value - before[name]) / num_jobs for name, value in self.cpu_seconds().items()}


def describe_cpu(milliseconds: CpuTimes) -> str:
    """Return the CPU time of all processes, the largest first."""
    largest = sorted(milliseconds, key=lambda name: -milliseconds[name])
    parts = ", ".join(f"{name} {milliseconds[name]:.1f}" for name in largest)
    return f"{sum(milliseconds.values()):.0f} ms ({parts})"
