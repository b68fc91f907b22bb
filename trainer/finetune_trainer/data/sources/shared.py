"""Opens a data set of the hub or of an object store once for all ranks, so that they do not request the same things."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from typing import TypeVar, cast

from finetune_contract.bucket import is_bucket_url
from finetune_trainer.data.sources.open import is_on_hub
from finetune_trainer.distributed.world import World

_LOG = logging.getLogger(__name__)

T = TypeVar("T")


def open_shared(location: str, world: World, open_source: Callable[[], T]) -> T:
    """Return what `open_source` returns. All ranks call it.

    Rank 0 opens a remote data set, and the others get the result, which names files of the cache. Ranks that do not
    share the disk with rank 0 open it themselves, one on each node first. Local data sets are opened by each rank.

    Args:
        location: location of the data set.
        world: the ranks.
        open_source: opens the data set.
    """
    if world.size == 1 or not world.share(is_bucket_url(location) or is_on_hub(location)):
        return open_source()
    opened = open_source() if world.is_first else None
    data = world.share(_dump(opened) if world.is_first else b"")
    if opened is None:
        opened = cast("T | None", _load(data))
    if any(world.gather_numbers(int(opened is None))):
        if opened is None and world.local_rank == 0:
            opened = open_source()
        world.barrier()
        if opened is None:
            opened = open_source()
    assert opened is not None
    return opened


def _dump(opened: object) -> bytes:
    """Return an opened data set as bytes; empty if it cannot be sent to another process."""
    try:
        return pickle.dumps(opened)
    except (pickle.PicklingError, TypeError, AttributeError):
        _LOG.info("each rank opens the data set itself", exc_info=True)
        return b""


def _load(data: bytes) -> object | None:
    """Return a data set that rank 0 has opened; None if its files are not on this disk."""
    if not data:
        return None
    try:
        loaded: object = pickle.loads(data)  # noqa: S301  from rank 0 of the same job
    except OSError:
        return None
    return loaded
