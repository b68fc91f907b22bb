"""Where the time of a step goes, and what limits it. Pure.

The host's time is measured by its clock. A GPU works next to the host, so its idle time is derived: at the end of a
step the host waits for the device. If this wait is short, the device has finished each operation as soon as the host
has launched it, and the host is the bottleneck. If it is long, the device had work all the time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from finetune_contract.heartbeat import StepShares

KEEPS_UP = 0.05
"""The host limits the speed if the device is behind it by less than this share of the step at the end of the passes."""


@dataclass(frozen=True)
class StepTimes:
    """Times of one step, in seconds.

    Attributes:
        total: the whole step, by the host's clock, with all parts below.
        data: the host waited for samples.
        exchange: the host waited in the sum of the gradients.
        device_exchange: the GPU's time in the sum of the gradients; None on CPUs.
        sync: the host waited for the device.
        checkpoint: the loop was paused for a checkpoint.
    """

    total: float
    data: float = 0.0
    exchange: float = 0.0
    device_exchange: float | None = None
    sync: float = 0.0
    checkpoint: float = 0.0


def part_seconds(times: StepTimes, is_gpu: bool) -> StepShares:
    """Return the parts of one step in seconds. They add up to `total`."""
    data = min(times.data, times.total)
    checkpoint = min(times.checkpoint, times.total - data)
    rest = times.total - data - checkpoint
    if not is_gpu:
        exchange = min(times.exchange, rest)
        return _parts(rest - exchange, 0.0, data, exchange, checkpoint)
    waited = min(times.exchange + times.sync, rest)
    exchange = min(waited, times.exchange if times.device_exchange is None else times.device_exchange)
    behind = waited - exchange
    work = rest - exchange
    if behind < KEEPS_UP * rest:
        return _parts(behind, work - behind, data, exchange, checkpoint)
    return _parts(work, 0.0, data, exchange, checkpoint)


def _parts(compute: float, host: float, data: float, exchange: float, checkpoint: float) -> StepShares:
    # Seconds are no shares yet, so they are not validated as such.
    return StepShares.model_construct(compute=compute, host=host, data=data, exchange=exchange, checkpoint=checkpoint)


def mean_shares(steps: Iterable[StepTimes], is_gpu: bool) -> StepShares | None:
    """Return the shares of the parts in the time of all steps together; None without any time."""
    parts = [part_seconds(times, is_gpu) for times in steps]
    sums = {name: sum(getattr(part, name) for part in parts) for name in StepShares.model_fields}
    total = sum(sums.values())
    if total <= 0:
        return None
    return StepShares(**{name: min(1.0, max(0.0, seconds / total)) for name, seconds in sums.items()})
