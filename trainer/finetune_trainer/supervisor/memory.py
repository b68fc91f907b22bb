"""Whether the kernel has killed a process of this pod because memory ran out, as the pod's cgroup counts it.

The exit code alone does not show it: SIGKILL has many senders, and the death of a data loader's worker is an ordinary
exception in its rank. The container runtime records only the end of the container's first process.
"""

from __future__ import annotations

from pathlib import Path

from finetune_contract.exit_codes import OOM_KILL

CGROUP = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
MEBIBYTE = 2**20
UNLIMITED_BYTES = 2**60
"""From this number on, cgroup v1 means that there is no limit."""


def num_oom_kills(root: Path = CGROUP, own: Path = OWN) -> int:
    """Return how many processes of the cgroup (v2 or v1) the kernel has killed for lack of memory; 0 if unknown."""
    for path in (*_candidates(root, own, "", "memory.events"), *_candidates(root, own, "memory", "memory.oom_control")):
        try:
            counters = dict(line.split() for line in path.read_text().splitlines())
            return int(counters["oom_kill"])
        except (OSError, ValueError, KeyError):
            continue
    return 0


def memory_limit(root: Path = CGROUP, own: Path = OWN) -> int | None:
    """Return the memory limit of the cgroup (v2 or v1) in bytes; None if it has none, or it is unknown."""
    for path in (*_candidates(root, own, "", "memory.max"), *_candidates(root, own, "memory", "memory.limit_in_bytes")):
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        if text.isdecimal() and int(text) < UNLIMITED_BYTES:
            return int(text)
        return None
    return None


def describe_oom_kill(limit_bytes: int | None) -> str:
    """Return the line that follows the last output of a rank that ended when the kernel killed a process of its pod.

    The operator recognizes it as lack of memory (`plan.model.causes`).
    """
    limit = f", whose memory limit is {limit_bytes // MEBIBYTE} MiB" if limit_bytes is not None else ""
    return f"{OOM_KILL}{limit}"


def _candidates(root: Path, own: Path, controller: str, name: str) -> list[Path]:
    """Return the paths of a file of the own cgroup: as a container sees it, and as a process of the host does."""
    paths = [root / controller / name]
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return paths
    for line in lines:
        _, controllers, folder = line.split(":", 2)
        if controller in controllers.split(","):
            paths.insert(0, root / controller / folder.lstrip("/") / name)
    return paths
