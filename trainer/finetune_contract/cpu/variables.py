"""Environment variables that put a placement into effect in one rank: thread pools, oneCCL and libfabric.

Compute threads are held on their CPUs by the affinity mask of the rank, not by OMP_PLACES, OMP_PROC_BIND or
KMP_AFFINITY: these bind the main thread to one CPU, and so every other thread that it starts; and forked ranks have
loaded their OpenMP runtime before they know their cores.
"""

from __future__ import annotations

from collections.abc import Mapping

from finetune_contract.cpu.network import LOOPBACK, Network
from finetune_contract.cpu.placement import Placement, RankPlace
from finetune_contract.cpu.spec import CpuBackend

BLOCK_MILLISECONDS = 1
"""Time for which Intel's OpenMP threads spin after a parallel region. Its default, 200 ms, takes the CPU of others."""


def thread_variables(place: RankPlace, env: Mapping[str, str], *, has_intel_openmp: bool = False) -> dict[str, str]:
    """Return the variables that limit the thread pools of a rank. Values that the user has set are kept."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    values = {name: env.get(name) or str(place.num_threads) for name in names}
    if has_intel_openmp:
        values["KMP_BLOCKTIME"] = env.get("KMP_BLOCKTIME") or str(BLOCK_MILLISECONDS)
    return values


def worker_affinity(placement: Placement, num_workers: int) -> str:
    """Return the list of oneCCL: the CPUs of the workers of all ranks of the pod, rank by rank.

    Every rank gets the complete list. oneCCL aborts if it has fewer entries than the pod has workers.
    """
    numbers: list[int] = []
    for place in placement.ranks:
        cpus = place.communication or place.compute[-1:]
        numbers.extend(cpus[worker % len(cpus)] for worker in range(num_workers) if cpus)
    return ",".join(map(str, numbers))


def fabric_variables(
    placement: Placement, local_rank: int, backend: str, network: Network, env: Mapping[str, str]
) -> dict[str, str]:
    """Return the variables of the communication library of a rank. Values that the user has set are kept.

    oneCCL starts without mpirun: the ranks find each other by the key-value store of torch.
    """
    values: dict[str, str] = {}
    uses_network = network.interface not in ("", LOOPBACK)
    if backend == CpuBackend.GLOO and uses_network:
        values["GLOO_SOCKET_IFNAME"] = network.interface
    if backend == CpuBackend.CCL:
        given = env.get("CCL_WORKER_COUNT", "")
        num_own = min((len(place.communication) for place in placement.ranks if place.communication), default=1)
        num_workers = int(given) if given.isdecimal() and int(given) else num_own
        values = {
            "CCL_PROCESS_LAUNCHER": "none",
            "CCL_LOCAL_RANK": str(local_rank),
            "CCL_LOCAL_SIZE": str(len(placement.ranks)),
            "CCL_ATL_TRANSPORT": "ofi",
            "CCL_WORKER_COUNT": str(num_workers),
            "CCL_WORKER_AFFINITY": worker_affinity(placement, num_workers),
            "FI_PROVIDER": network.provider,
        }
        if network.interface:
            values |= {"CCL_KVS_IFACE": network.interface, "FI_TCP_IFACE": network.interface}
    return {name: env.get(name) or value for name, value in values.items()}
