"""Chooses the cores that a pod is pinned to. Pure. Two thread pools on the same cores slow each other down a lot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from finetune_operator.plan.model.types import Manifest


def wanted_cores(container: Manifest, num_pods: int, num_cores: int) -> int:
    """Return the number of cores for a pod: its cpu request (or limit), rounded up, else an even share.

    The result never exceeds the share that lets the complete gang run, because the manifest may be written for larger
    machines.
    """
    share = max(1, num_cores // max(1, num_pods))
    resources = container.get("resources") or {}
    requested = (resources.get("requests") or {}).get("cpu") or (resources.get("limits") or {}).get("cpu")
    return share if requested is None else min(share, max(1, parse_cpu(requested)))


def parse_cpu(quantity: str | int | float) -> int:
    """Return the cores of a Kubernetes cpu quantity, rounded up ('1500m' is 2).

    Raises:
        ValueError: the text is not a cpu quantity.
    """
    text = str(quantity)
    milli = int(text[:-1]) if text.endswith("m") else round(float(text) * 1000)
    return -(-milli // 1000)


def choose_cores(
    available: Sequence[int], siblings: Iterable[frozenset[int]], others: Iterable[frozenset[int]], wanted: int
) -> frozenset[int] | None:
    """Choose cores that no pod of the same job uses, the cores that other jobs use least first.

    Args:
        available: cores of this machine that this process may use, by preference.
        siblings: cores of the job's running pods.
        others: cores of other jobs' running pods. Concurrent jobs may have to share cores.
        wanted: number of cores.

    Returns:
        The cores; None if the siblings leave too few.
    """
    taken = frozenset[int]().union(*siblings)
    load = Counter(core for cores in others for core in cores)
    free = sorted((core for core in available if core not in taken), key=load.__getitem__)
    return frozenset(free[:wanted]) if len(free) >= wanted else None
