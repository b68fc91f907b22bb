"""The share of the cores that each rank gets. Two thread pools on the same cores slow each other down several times."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class CoreShare:
    """Cores and threads of one rank."""

    num_threads: int
    cores: frozenset[int] | None
    """Cores to pin the rank to; None if the pod has a CPU time quota and no exclusive cores."""


def share_cores(cores: frozenset[int], quota: float | None, num_ranks: int) -> list[CoreShare]:
    """Divide the cores that this process may run on among the ranks.

    A quota below the number of cores means that other pods use them too. Then only the number of threads is divided,
    and no rank is pinned.

    Args:
        cores: affinity of the process.
        quota: CPU time that the cgroup grants, in cores; None: no limit.
        num_ranks: ranks in this pod.
    """
    usable = len(cores) if quota is None else min(len(cores), max(1, int(quota)))
    each = max(1, usable // num_ranks)
    if usable < len(cores) or usable < num_ranks:
        return [CoreShare(each, None)] * num_ranks
    ordered = sorted(cores)
    return [CoreShare(each, frozenset(ordered[i * each : (i + 1) * each])) for i in range(num_ranks)]


def thread_environment(share: CoreShare, env: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that limit the thread pools to the share. Values that the user has set are kept."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    return {name: env.get(name) or str(share.num_threads) for name in names}


def ccl_environment(share: CoreShare, local_rank: int) -> dict[str, str]:
    """Return the variables that oneCCL needs for each rank: its number on the node, and a core for its worker thread.

    The worker gets the last core of the share, and the compute threads do not use it. With one core they share it.
    """
    variables = {"CCL_LOCAL_RANK": str(local_rank)}
    if share.cores is not None and len(share.cores) > 1:
        variables["CCL_WORKER_AFFINITY"] = str(max(share.cores))
        variables["OMP_NUM_THREADS"] = variables["MKL_NUM_THREADS"] = str(share.num_threads - 1)
    return variables


def affinity() -> frozenset[int]:
    """Return the cores that this process may run on."""
    return frozenset(os.sched_getaffinity(0))


def cgroup_quota(root: Path = CGROUP) -> float | None:
    """Return the CPU time that the cgroup (v2 or v1) grants, in cores; None if it has no limit."""
    try:
        limit, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit = (root / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if limit == "max" or int(limit) <= 0:
        return None
    return int(limit) / int(period)
