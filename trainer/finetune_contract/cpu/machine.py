"""The topology of a machine: its logical CPUs with their cores, sockets and NUMA nodes. Plain data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class LogicalCpu:
    """One hardware thread, by the number that the kernel gives it."""

    number: int
    core: int
    """Identity of its physical core: the smallest number of a hardware thread of that core."""
    socket: int = 0
    numa_node: int = 0
    kind: int = 0
    """Kind of the core, from 0, the fastest: hybrid processors have several."""


@dataclass(frozen=True)
class Core:
    """One physical core, with the hardware threads that may be used."""

    cpus: tuple[int, ...]
    """Numbers of its hardware threads, ascending."""
    socket: int
    numa_node: int
    kind: int


@dataclass(frozen=True)
class Machine:
    """The logical CPUs that a process may use, and the CPU time that it may consume."""

    cpus: tuple[LogicalCpu, ...]
    quota: float | None = None
    """CPU time that the cgroup grants, in CPUs; None: no limit."""
    assumed: str = ""
    """What the description of the machine left open, and what was assumed; empty if nothing."""

    @property
    def cores(self) -> tuple[Core, ...]:
        """Return the physical cores, by socket, NUMA node, kind and number."""
        threads: dict[int, list[LogicalCpu]] = {}
        for cpu in sorted(self.cpus):
            threads.setdefault(cpu.core, []).append(cpu)
        cores = (
            Core(tuple(cpu.number for cpu in each), each[0].socket, each[0].numa_node, each[0].kind)
            for each in threads.values()
        )
        return tuple(sorted(cores, key=lambda core: (core.socket, core.numa_node, core.kind, core.cpus)))

    @property
    def has_shared_cpus(self) -> bool:
        """Return whether others use the CPUs, too: the quota is less than their number."""
        return self.quota is not None and self.quota < len(self.cpus)

    def restricted_to(self, numbers: Iterable[int]) -> Machine:
        """Return the machine with these logical CPUs only; all of them if it has none of these."""
        allowed = frozenset(numbers)
        cpus = tuple(cpu for cpu in self.cpus if cpu.number in allowed)
        return Machine(cpus or self.cpus, self.quota, self.assumed)

    def describe(self) -> str:
        """Return the size of the machine, e.g. '2 sockets, 2 NUMA nodes, 112 cores, 224 hardware threads'."""
        cores = self.cores
        counts = (
            (len({core.socket for core in cores}), "socket"),
            (len({core.numa_node for core in cores}), "NUMA node"),
            (len(cores), "core"),
            (len(self.cpus), "hardware thread"),
        )
        text = ", ".join(f"{count} {name}{'' if count == 1 else 's'}" for count, name in counts)
        num_kinds = len({core.kind for core in cores})
        text += f", {num_kinds} kinds of cores" if num_kinds > 1 else ""
        return text if self.quota is None else f"{text}, quota of {self.quota:g} CPUs"


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """Parse the kernel's list of numbers, e.g. '0-3,8' as (0, 1, 2, 3, 8); empty text gives an empty tuple.

    Raises:
        ValueError: the text is not a list.
    """
    numbers: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.strip().partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(numbers))


def format_cpu_list(numbers: Iterable[int]) -> str:
    """Return numbers in the kernel's form, e.g. '0-3,8'."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
