"""Finds the GPUs of this machine and chooses those of a pod."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from finetune_operator.plan.model.types import Manifest

GPU_RESOURCE = "nvidia.com/gpu"
DRIVER_GPUS = Path("/proc/driver/nvidia/gpus")


def find_gpus(env: Mapping[str, str] = os.environ, driver: Path = DRIVER_GPUS) -> tuple[str, ...]:
    """Return the GPUs of this machine by their names in CUDA_VISIBLE_DEVICES. If the variable is set, only those."""
    if "CUDA_VISIBLE_DEVICES" in env:
        return tuple(name.strip() for name in env["CUDA_VISIBLE_DEVICES"].split(",") if name.strip())
    try:
        return tuple(str(number) for number, _ in enumerate(driver.iterdir()))
    except OSError:
        return ()


def wanted_gpus(container: Manifest) -> int:
    """Return the number of GPUs that a container requests."""
    resources = container.get("resources") or {}
    requested = {**(resources.get("requests") or {}), **(resources.get("limits") or {})}
    return int(requested.get(GPU_RESOURCE, 0))


def choose_gpus(available: Iterable[str], siblings: Iterable[tuple[str, ...]], wanted: int) -> tuple[str, ...] | None:
    """Choose GPUs that no pod of the same job uses; None if too few are free."""
    taken = {gpu for gpus in siblings for gpu in gpus}
    free = [gpu for gpu in available if gpu not in taken]
    return tuple(free[:wanted]) if len(free) >= wanted else None
