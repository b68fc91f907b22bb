"""Reads the topology of this machine from /sys. A container sees that of its node."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from finetune_contract.cpu.cgroup import read_limits
from finetune_contract.cpu.machine import LogicalCpu, Machine, parse_cpu_list

SYSFS = Path("/sys")
SAME_KIND = 0.85
"""Cores of at least this share of the highest speed are of the fastest kind: cores of one kind differ by a few percent,
the small cores of hybrid processors by a quarter and more."""


def read_machine() -> Machine:
    """Return the logical CPUs that this process may use, with the quota of its cgroup."""
    limits = read_limits()
    allowed = os.sched_getaffinity(0)
    if limits.cpus:
        allowed = (allowed & set(limits.cpus)) or allowed
    return read_topology(allowed, limits.quota)


def read_topology(allowed: Iterable[int], quota: float | None = None, root: Path = SYSFS) -> Machine:
    """Return the machine with the CPUs that may be used.

    Args:
        allowed: numbers of the logical CPUs.
        quota: CPU time that the cgroup grants, in CPUs.
        root: root of the sysfs file system.
    """
    numbers = sorted(allowed)
    folder = root / "devices/system/cpu"
    nodes = _numa_nodes(root / "devices/system/node")
    slow = _slow_cores(root, folder, numbers)
    cpus, unknown = [], 0
    for number in numbers:
        topology = folder / f"cpu{number}/topology"
        siblings = _list(topology / "core_cpus_list") or _list(topology / "thread_siblings_list")
        unknown += not siblings
        cpus.append(
            LogicalCpu(
                number,
                core=min(siblings, default=number),
                socket=max(0, _number(topology / "physical_package_id", 0)),
                numa_node=nodes.get(number, 0),
                kind=int(number in slow),
            )
        )
    assumed = f"{folder} does not describe all CPUs: each one is taken for a core" if unknown else ""
    return Machine(tuple(cpus), quota, assumed)


def _numa_nodes(folder: Path) -> dict[int, int]:
    """Return the NUMA node of each logical CPU."""
    nodes: dict[int, int] = {}
    for path in sorted(folder.glob("node[0-9]*")):
        nodes.update(dict.fromkeys(_list(path / "cpulist"), int(path.name.removeprefix("node"))))
    return nodes


def _slow_cores(root: Path, folder: Path, numbers: Iterable[int]) -> frozenset[int]:
    """Return the logical CPUs of the small cores of a hybrid processor; none if all are of one kind."""
    if atoms := _list(root / "devices/cpu_atom/cpus"):
        return frozenset(atoms)
    speeds = {
        number: _number(folder / f"cpu{number}/cpu_capacity", 0)
        or _number(folder / f"cpu{number}/cpufreq/cpuinfo_max_freq", 0)
        for number in numbers
    }
    return slow_cpus(speeds)


def slow_cpus(speeds: Mapping[int, float]) -> frozenset[int]:
    """Return the logical CPUs that are clearly slower than the fastest; 0 means an unknown speed."""
    highest = max(speeds.values(), default=0)
    return frozenset(number for number, speed in speeds.items() if 0 < speed < SAME_KIND * highest)


def _list(path: Path) -> tuple[int, ...]:
    try:
        return parse_cpu_list(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return ()


def _number(path: Path, default: int) -> int:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return default
