"""The state of a rank between two steps, and helpers to read it from another thread."""

from __future__ import annotations

import pickle
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from finetune_trainer.script.random_state import uses_gpu
from finetune_trainer.script.saver import RankRecord


@dataclass(frozen=True)
class Boundary:
    """State between two steps that the survivors of a lost peer save.

    Attributes:
        record: of this rank.
        ready: the work of a GPU up to here.
    """

    record: RankRecord
    ready: Any = None


def unpack(state: bytes) -> RankRecord:
    """Return the record of another rank from its copy."""

    record = pickle.loads(state)  # noqa: S301  from a rank of this job
    assert isinstance(record, RankRecord)
    return record


def learning_rate(optimizer: Any) -> float | None:
    """Return the learning rate of the first group of an optimizer."""
    groups = getattr(optimizer, "param_groups", None)
    rate = groups[0].get("lr") if groups else None
    return rate if isinstance(rate, float) else None


def device_event() -> Any:
    """Return an event after all work that this thread has given to a GPU; None without one."""
    if not uses_gpu():
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event


def other_stream(ready: Any) -> Any:
    """Return a context that copies from a GPU without waiting for a collective that never ends."""
    if ready is None:
        return ExitStack()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_event(ready)
    return torch.cuda.stream(stream)
