"""A check of all devices before the first step, after an attempt that ended because of a faulty GPU. Called by `run`.

Each rank multiplies matrices whose product is known, and all ranks sum a known tensor. A wrong result ends the rank
with the exit code of a faulty device. The times of the products show ranks that are slower than the others.
"""

from __future__ import annotations

import queue
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune_trainer.distributed.world import World
from finetune_trainer.errors import DeviceError

LIMIT_SECONDS = 4.0
"""Time that a GPU has for its products, which take a healthy one milliseconds."""
START_SECONDS = 60.0
"""Time that a GPU has for its first operation, which loads libraries. Training needs it anyway."""
SLOW = 1.5
"""Factor over the median time of all ranks from which a rank counts as slow."""
NUM_PRODUCTS = 8
SIZE_ON_GPU, SIZE_ON_CPU = 4096, 256
_FAULTY = -1
"""Microseconds of a device that does not respond, or computes wrong results."""


@dataclass(frozen=True)
class CheckResult:
    """Ranks that the check has found.

    Attributes:
        faulty: ranks whose device does not respond, or computes wrong results.
        slow: ranks with a slow device, and how many times slower it is than the median of all.
    """

    faulty: tuple[int, ...]
    slow: tuple[tuple[int, float], ...]


def check_devices(world: World, warn: Callable[[str], None], product: Callable[[torch.device], float | None]) -> None:
    """Check the devices of all ranks. All ranks call it.

    Args:
        world: the ranks.
        warn: receives messages for the user, on rank 0.
        product: returns the seconds of the products on a device; None if their results are wrong.

    Raises:
        DeviceError: the device of this rank is faulty.
        FabricError: a peer was lost.
    """
    if world.device.type == "cpu":
        # A CPU that is busy with other work is not faulty.
        seconds = product(world.device)
    else:
        has_started = within(START_SECONDS, lambda: product(world.device)) is not None
        seconds = within(LIMIT_SECONDS, lambda: product(world.device)) if has_started else None
        if seconds is None:
            # A device that does not respond cannot take part in the sum; the others notice the end of this rank.
            raise DeviceError(_describe(world.rank))
    microseconds = _FAULTY if seconds is None else max(1, round(1e6 * seconds))
    result = find_bad(world.gather_numbers(microseconds))
    total = world.sum(torch.full((1024,), float(world.rank + 1), device=world.device))
    is_wrong = bool((total != world.size * (world.size + 1) / 2).any())
    if world.rank in result.faulty or is_wrong:
        raise DeviceError(_describe(world.rank))
    if world.is_first:
        for rank in result.faulty:
            warn(_describe(rank))
        for rank, factor in result.slow:
            warn(f"rank {rank} is slow: its device needs {factor:.1f} times the median of all ranks for the same work")


def find_bad(microseconds: Sequence[int]) -> CheckResult:
    """Return the faulty and the slow ranks. Pure.

    Args:
        microseconds: time of each rank's products; `_FAULTY` for a faulty device.
    """
    times = [each for each in microseconds if each != _FAULTY]
    middle = statistics.median_low(times) if times else 1
    return CheckResult(
        faulty=tuple(rank for rank, each in enumerate(microseconds) if each == _FAULTY),
        slow=tuple((rank, each / middle) for rank, each in enumerate(microseconds) if each >= SLOW * middle),
    )


def multiply(device: torch.device) -> float | None:
    """Return the seconds of some products of known matrices; None if a result is wrong.

    All elements are small integers, so the sums are exact in every number format and order.
    """
    size = SIZE_ON_GPU if device.type == "cuda" else SIZE_ON_CPU
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = (torch.arange(size, device=device) % 3 - 1).to(dtype)
    left, right = rows.view(-1, 1).expand(size, size).contiguous(), torch.ones(size, size, device=device, dtype=dtype)
    expected = rows.float() * size
    _multiply_once(left, right)
    began = time.monotonic()
    results = [_multiply_once(left, right) for _ in range(NUM_PRODUCTS)]
    seconds = time.monotonic() - began
    return seconds if all(bool((result == expected).all()) for result in results) else None


def _multiply_once(left: Tensor, right: Tensor) -> Tensor:
    """Return one column of the product, on the host: this waits for the device."""
    column: Tensor = (left @ right)[:, -1].float()
    if column.device.type == "cuda":
        torch.cuda.synchronize(column.device)
    return column


def within(limit_seconds: float, compute: Callable[[], float | None]) -> float | None:
    """Return the result of a computation; None if it fails or takes too long. Its thread then ends with the process."""
    results: queue.Queue[float | None] = queue.Queue()

    def run() -> None:
        try:
            results.put(compute())
        except RuntimeError:
            # The device has failed: CUDA reports every error in this way.
            results.put(None)

    threading.Thread(target=run, name="device-check", daemon=True).start()
    try:
        return results.get(timeout=limit_seconds)
    except queue.Empty:
        return None


def _describe(rank: int) -> str:
    return f"the device of rank {rank} does not respond or computes wrong results"
