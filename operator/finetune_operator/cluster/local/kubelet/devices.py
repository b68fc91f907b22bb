"""Which GPUs a pod gets, where this machine has any."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from finetune_operator.plan.model.types import Manifest

GPU_RESOURCE = "nvidia.com/gpu"
DRIVER_GPUS = Path("/proc/driver/nvidia/gpus")


def find_gpus(env: Mapping[str, str] = os.environ, driver: Path = DRIVER_GPUS) -> tuple[str, ...]:
    """GPUs of this machine, as CUDA_VISIBLE_DEVICES names them; what that variable hides stays hidden."""
    if "CUDA_VISIBLE_DEVICES" in env:
        return tuple(name.strip() for name in env["CUDA_VISIBLE_DEVICES"].split(",") if name.strip())
    try:
        return tuple(str(number) for number, _ in enumerate(driver.iterdir()))
    except OSError:
        return ()


def wanted_gpus(container: Manifest) -> int:
    """How many GPUs a container asks for."""
    resources = container.get("resources") or {}
    asked = {**(resources.get("requests") or {}), **(resources.get("limits") or {})}
    return int(asked.get(GPU_RESOURCE, 0))


def choose_gpus(available: Iterable[str], siblings: Iterable[tuple[str, ...]], wanted: int) -> tuple[str, ...] | None:
    """Choose GPUs that no pod of the same job has; None while there are too few."""
    taken = {gpu for gpus in siblings for gpu in gpus}
    free = [gpu for gpu in available if gpu not in taken]
    return tuple(free[:wanted]) if len(free) >= wanted else None
