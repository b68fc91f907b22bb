"""Peak memory of this process as the kernel counts it; used by the benchmarks that measure memory."""

from __future__ import annotations

from pathlib import Path


def reset_peak() -> None:
    """Reset the kernel's counter of this process's peak memory."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Return the peak resident memory since the last `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")
