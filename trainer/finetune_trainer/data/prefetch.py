"""Makes the next micro-batch while the model is busy with this one, so that the loop does not wait for it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from finetune_trainer.data.batches import Batch, BatchMaker
from finetune_trainer.data.cache.encode import LiveLatents
from finetune_trainer.data.images.decoding import Size
from finetune_trainer.data.sampling.order import SampleRef
from finetune_trainer.data.sources.base import Samples


class Prefetcher:
    """One micro-batch ahead. A batch follows from its samples alone, so it does not matter when it is made.

    Args:
        batches: makes them; where it encodes images as it goes, on the device that trains, nothing is made ahead.
    """

    def __init__(self, batches: BatchMaker) -> None:
        self._batches = batches
        self._pool: ThreadPoolExecutor | None = None
        if not isinstance(batches.latents, LiveLatents):
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: tuple[tuple[SampleRef, ...], Future[Batch]] | None = None
        self.waited_seconds = 0.0
        """How long the loop has waited for batches in all."""

    @property
    def source(self) -> Samples:
        """Where the samples come from."""
        return self._batches.source

    def split(self, refs: Sequence[SampleRef], size: int) -> list[list[SampleRef]]:
        """Cut samples into micro-batches of at most `size`, in their order; those of one shape together."""
        by_shape: dict[Size, list[SampleRef]] = {}
        for ref in refs:
            by_shape.setdefault(self._batches.shape(ref.index), []).append(ref)
        return [group[start : start + size] for group in by_shape.values() for start in range(0, len(group), size)]

    def take(self, refs: Sequence[SampleRef], then: Sequence[SampleRef]) -> Batch:
        """The micro-batch of these samples; that of `then` is begun."""
        began = time.monotonic()
        ahead, self._ahead = self._ahead, None
        is_known = ahead is not None and ahead[0] == tuple(refs)
        batch = ahead[1].result() if ahead is not None and is_known else self._batches.make(refs)
        self.waited_seconds += time.monotonic() - began
        if self._pool is not None and then:
            self._ahead = (tuple(then), self._pool.submit(self._batches.make, then))
        return batch
