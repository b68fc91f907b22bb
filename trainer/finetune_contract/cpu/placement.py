"""The placement of the ranks of one pod on its machine: cores for computing and for communication, and memory. Pure.

Ranks compute in lockstep, so each gets the same number of cores. Compute threads use one hardware thread of each core:
matrix units are shared by the threads of a core, and two compute threads on one core slow each other down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from finetune_contract.cpu.machine import Core, Machine, format_cpu_list
from finetune_contract.cpu.spec import CpuBackend, CpuSpec, RanksPer

NCCL = "nccl"
"""Backend of GPU ranks."""
MIN_CORES_TO_SEPARATE = 4
"""Cores of a rank from which on one of them is for communication alone: with fewer, the step would take longer."""
MIN_BALANCE = 0.75
"""Smallest share of the average number of cores that a rank may get to keep to its NUMA node."""


class PlacementError(ValueError):
    """The ranks cannot be placed as requested. The message names the field and the remedy."""


@dataclass(frozen=True)
class PlacementRequest:
    """What the placement depends on beside the machine."""

    num_ranks: int
    """Ranks of this pod."""
    ranks_per: RanksPer = RanksPer.NUMA
    cores_for_communication: int | None = None
    """Cores of each rank for communication; None: chosen here."""
    has_worker_threads: bool = False
    """Whether the communication library computes sums in threads of its own that never sleep, as oneCCL does."""
    one_thread_per_core: bool = True
    """Whether the other hardware threads of a core stay free; not on GPU nodes, whose ranks load data on them."""

    @classmethod
    def of(cls, cpu: CpuSpec, num_ranks: int, backend: str) -> PlacementRequest:
        """Return the request of a job.

        Args:
            cpu: its settings of CPU training.
            num_ranks: ranks of a pod.
            backend: backend of torch.distributed.
        """
        return cls(
            num_ranks,
            cpu.ranks_per,
            cpu.cores_for_communication,
            has_worker_threads=backend == CpuBackend.CCL,
            one_thread_per_core=backend != NCCL,
        )


@dataclass(frozen=True)
class RankPlace:
    """Place of one rank."""

    num_threads: int
    """Compute threads."""
    compute: tuple[int, ...]
    """CPUs that the rank is pinned to; empty: it is not pinned."""
    communication: tuple[int, ...] = ()
    """CPUs for communication threads. Without own cores they are the last CPUs of the rank."""
    has_own_communication: bool = False
    """Whether no compute thread uses these CPUs."""
    helpers: tuple[int, ...] = ()
    """CPUs for threads that neither compute nor communicate: all hardware threads of the compute cores."""
    memory: tuple[int, ...] = ()
    """NUMA nodes whose memory the rank uses; empty: not bound."""

    def describe(self) -> str:
        """Return the place as text, e.g. '27 threads on CPUs 0-26, communication on 27, memory of NUMA node 0'."""
        threads = f"{self.num_threads} thread{'' if self.num_threads == 1 else 's'}"
        parts = [f"{threads} on CPUs {format_cpu_list(self.compute)}" if self.compute else f"{threads}, not pinned"]
        if self.communication:
            shared = "" if self.has_own_communication else " (shared)"
            parts.append(f"communication on {format_cpu_list(self.communication)}{shared}")
        if self.memory:
            plural = "" if len(self.memory) == 1 else "s"
            parts.append(f"memory of NUMA node{plural} {format_cpu_list(self.memory)}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Placement:
    """Places of all ranks of a pod."""

    ranks: tuple[RankPlace, ...]
    reason: str
    """How the machine was divided."""

    def without_memory(self) -> Placement:
        """Return the placement for a pod that may not bind memory."""
        return replace(self, ranks=tuple(replace(place, memory=()) for place in self.ranks))


def place_ranks(machine: Machine, request: PlacementRequest) -> Placement:
    """Place the ranks of a pod.

    No two ranks share a core while there are enough, and no core stays idle. With a quota below the number of CPUs,
    other pods use the machine, too: each rank is then pinned to its part of the machine, not to single threads, so
    that the kernel can avoid busy CPUs.

    Raises:
        PlacementError: no core is left to compute on.
    """
    num_ranks = request.num_ranks
    cores = machine.cores
    if len(machine.cpus) < num_ranks:
        _check_communication(request, 0)
        last = tuple(sorted(cpu.number for cpu in machine.cpus))
        place = RankPlace(1, ())
        ranks = tuple(
            replace(place, communication=(last[rank % len(last)],) if request.has_worker_threads else ())
            for rank in range(num_ranks)
        )
        return Placement(ranks, f"{num_ranks} ranks share {len(last)} CPUs: processesPerNode is larger")
    if len(cores) < num_ranks:
        cores = _as_cores(cores)
        shares, reason = _divide(cores, num_ranks), "ranks share cores: processesPerNode is larger than their number"
    else:
        shares, reason = _divide_by_units(cores, request)
    sizes = [len(share) for share in shares]
    if machine.has_shared_cpus and machine.quota is not None:
        sizes = _even_sizes(max(num_ranks, min(len(cores), int(machine.quota))), num_ranks)
    binds_memory = request.ranks_per is not RanksPer.NODE and len({core.numa_node for core in machine.cores}) > 1
    ranks = tuple(
        _place(share, size, machine, request, binds_memory=binds_memory)
        for share, size in zip(shares, sizes, strict=True)
    )
    if machine.has_shared_cpus:
        reason += "; the quota is less than the CPUs: threads are limited, and may use all CPUs of their part"
    return Placement(ranks, reason)


def _place(
    share: Sequence[Core], num_threads: int, machine: Machine, request: PlacementRequest, *, binds_memory: bool
) -> RankPlace:
    """Return the place of a rank on its cores.

    Args:
        share: cores of the rank.
        num_threads: threads that it may run at once; the number of its cores unless a quota is smaller.
        machine: the machine.
        request: the request.
        binds_memory: whether its memory is bound to the NUMA nodes of its cores.
    """
    num_own = _check_communication(request, min(num_threads, len(share)))
    nodes = tuple(sorted({core.numa_node for core in share}))
    all_nodes = {core.numa_node for core in machine.cores}
    memory = nodes if binds_memory and set(nodes) < all_nodes else ()
    every = tuple(sorted(cpu for core in share for cpu in core.cpus))
    if machine.has_shared_cpus:
        communication = tuple(core.cpus[-1] for core in share[len(share) - max(1, num_own) :])
        return RankPlace(
            num_threads - num_own, every, communication if _needs(request) else (), False, every, memory=memory
        )
    computing, own = (share[:-num_own], share[-num_own:]) if num_own else (share, ())
    # Without own cores the second hardware thread of one disturbs its compute thread least.
    shared = (computing[-1].cpus[-1],) if _needs(request) else ()
    communication = tuple(core.cpus[0] for core in own) or shared
    compute = tuple(sorted(core.cpus[0] for core in computing))
    helpers = tuple(sorted(cpu for core in computing for cpu in core.cpus))
    pinned = compute if request.one_thread_per_core else helpers
    return RankPlace(len(compute), pinned, communication, bool(own), helpers, memory)


def _needs(request: PlacementRequest) -> bool:
    """Return whether communication threads are placed at all."""
    return request.has_worker_threads or bool(request.cores_for_communication)


def _check_communication(request: PlacementRequest, num_cores: int) -> int:
    """Return the number of cores of a rank that are for communication alone.

    Raises:
        PlacementError: no core is left to compute on.
    """
    wanted = request.cores_for_communication
    if wanted is None:
        return int(request.has_worker_threads and num_cores >= MIN_CORES_TO_SEPARATE)
    if wanted and wanted >= num_cores:
        raise PlacementError(
            f"topology.cpu.coresForCommunication: {wanted} leaves no core to compute on, because each of the "
            f"{request.num_ranks} ranks has {num_cores}; write at most {max(0, num_cores - 1)}, a smaller "
            "processesPerNode, or more in resources.cpu"
        )
    return wanted


def _divide_by_units(cores: tuple[Core, ...], request: PlacementRequest) -> tuple[list[list[Core]], str]:
    """Divide the cores along sockets or NUMA nodes if that gives each rank about as many, otherwise evenly."""
    num_ranks = request.num_ranks
    units = _units(cores, request.ranks_per)
    name = {RanksPer.NUMA: "NUMA node", RanksPer.SOCKET: "socket", RanksPer.NODE: "machine"}[request.ranks_per]
    if len(units) % num_ranks == 0:
        each = len(units) // num_ranks
        shares = [
            [core for unit in units[rank * each : (rank + 1) * each] for core in unit] for rank in range(num_ranks)
        ]
        reason = f"{each} {name}{'' if each == 1 else 's'} per rank"
    elif num_ranks % len(units) == 0:
        each = num_ranks // len(units)
        shares = [share for unit in units if len(unit) >= each for share in _divide(unit, each)]
        reason = f"{each} ranks per {name}"
    else:
        shares, reason = [], ""
    if len(shares) == num_ranks and min(map(len, shares)) >= MIN_BALANCE * len(cores) / num_ranks:
        return shares, reason
    plural = "" if len(units) == 1 else "s"
    return _divide(cores, num_ranks), (
        f"cores divided evenly: {num_ranks} ranks do not fit {len(units)} {name}{plural} with the cores of this pod"
    )


def _units(cores: tuple[Core, ...], ranks_per: RanksPer) -> list[list[Core]]:
    """Return the cores of each socket, NUMA node or machine."""
    units: dict[object, list[Core]] = {}
    for core in cores:
        key = {RanksPer.NUMA: (core.socket, core.numa_node), RanksPer.SOCKET: core.socket, RanksPer.NODE: 0}[ranks_per]
        units.setdefault(key, []).append(core)
    return list(units.values())


def _divide(cores: Sequence[Core], num_ranks: int) -> list[list[Core]]:
    """Divide cores into contiguous parts, each kind evenly. Sizes differ by at most one."""
    shares: list[list[Core]] = [[] for _ in range(num_ranks)]
    for kind in sorted({core.kind for core in cores}):
        members = [core for core in cores if core.kind == kind]
        each, rest = divmod(len(members), num_ranks)
        # The remainder goes to the ranks with the fewest cores of the other kinds.
        order = sorted(range(num_ranks), key=lambda rank: (len(shares[rank]), rank))
        larger = frozenset(order[:rest])
        start = 0
        for rank in range(num_ranks):
            end = start + each + (rank in larger)
            shares[rank].extend(members[start:end])
            start = end
    return shares


def _even_sizes(total: int, num_parts: int) -> list[int]:
    each, rest = divmod(total, num_parts)
    return [each + (part < rest) for part in range(num_parts)]


def _as_cores(cores: Sequence[Core]) -> tuple[Core, ...]:
    """Return each hardware thread as a core of its own."""
    return tuple(replace(core, cpus=(cpu,)) for core in cores for cpu in core.cpus)
