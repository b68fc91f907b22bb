"""Limits of the cgroup of this process: CPU time and CPUs, in version 1 and 2."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from finetune_contract.cpu.machine import parse_cpu_list

CGROUP = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class CpuLimits:
    """CPU time and CPUs of a cgroup."""

    quota: float | None
    """CPU time, in CPUs; None: no limit."""
    cpus: tuple[int, ...]
    """CPUs of its cpuset; empty: no cpuset."""


def read_limits(root: Path = CGROUP, own: Path = OWN) -> CpuLimits:
    """Return the limits of this process: those of its cgroup and of all cgroups above it.

    Args:
        root: where the cgroups are mounted. In a container that is usually the cgroup of the container itself.
        own: file that names the cgroup of the process in each hierarchy.
    """
    quotas: list[float] = []
    cpus: tuple[int, ...] = ()
    for folder in _folders(root, own, "cpu"):
        quota = _quota(folder)
        quotas += [quota] if quota is not None else []
    for folder in _folders(root, own, "cpuset"):
        cpus = cpus or _cpus(folder)
    return CpuLimits(min(quotas, default=None), cpus)


def _folders(root: Path, own: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of a controller, from the cgroup of the process up to the root of each hierarchy."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    paths = {"": "/"}
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers or controller in controllers.split(","):
            paths[controllers] = path
    for controllers, path in sorted(paths.items(), reverse=True):
        mounts = [root] if not controllers else [root / controllers, root / controller]
        for mount in mounts:
            folder = mount / path.lstrip("/")
            while folder.is_relative_to(mount):
                yield folder
                folder = folder.parent
    # A version 1 hierarchy that is mounted without the path of the process.
    yield root / controller


def _quota(folder: Path) -> float | None:
    try:
        limit, period = (folder / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        try:
            limit = (folder / "cpu.cfs_quota_us").read_text(encoding="ascii").strip()
            period = (folder / "cpu.cfs_period_us").read_text(encoding="ascii").strip()
        except OSError:
            return None
    if limit == "max" or int(limit) <= 0 or int(period) <= 0:
        return None
    return int(limit) / int(period)


def _cpus(folder: Path) -> tuple[int, ...]:
    for name in ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus"):
        try:
            if cpus := parse_cpu_list((folder / name).read_text(encoding="ascii")):
                return cpus
        except (OSError, ValueError):
            continue
    return ()
