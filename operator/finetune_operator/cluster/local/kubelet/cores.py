"""Which cores a pod is pinned to. Pure. Two thread pools on the same cores slow each other down several times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from finetune_operator.plan.model.types import Manifest


def wanted_cores(container: Manifest, num_pods: int, num_cores: int) -> int:
    """How many cores a pod gets: its cpu request (or limit), rounded up, else an even share of the machine.

    Never more than the share that lets the whole gang run: the manifest may be made for larger machines.
    """
    share = max(1, num_cores // max(1, num_pods))
    resources = container.get("resources") or {}
    asked = (resources.get("requests") or {}).get("cpu") or (resources.get("limits") or {}).get("cpu")
    return share if asked is None else min(share, max(1, parse_cpu(asked)))


def parse_cpu(quantity: str | int | float) -> int:
    """Whole cores of a Kubernetes cpu quantity ('1500m' is 2).

    Raises:
        ValueError: it is none.
    """
    text = str(quantity)
    milli = int(text[:-1]) if text.endswith("m") else round(float(text) * 1000)
    return -(-milli // 1000)


def choose_cores(
    available: Iterable[int], siblings: Iterable[frozenset[int]], others: Iterable[frozenset[int]], wanted: int
) -> frozenset[int] | None:
    """Choose cores that no pod of the same job has, those that other jobs use least first.

    Args:
        available: cores of this machine that we may use.
        siblings: cores of the job's living pods.
        others: cores of other jobs' living pods; jobs that run side by side may have to share.
        wanted: how many.

    Returns:
        The cores; None while siblings leave too few.
    """
    taken = frozenset[int]().union(*siblings)
    load = Counter(core for cores in others for core in cores)
    free = sorted(set(available) - taken, key=lambda core: (load[core], core))
    return frozenset(free[:wanted]) if len(free) >= wanted else None
