"""Prepares the next micro-batch while the model trains on the current one, so that the loop does not wait for it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from finetune_trainer.data.batches import Batch, BatchMaker
from finetune_trainer.data.cache.encode import LiveLatents, LiveTexts
from finetune_trainer.data.mixture import MixedLatents
from finetune_trainer.data.sampling.order import SampleRef
from finetune_trainer.data.sampling.shapes import Size
from finetune_trainer.data.sources.base import SampleSet
from finetune_trainer.distributed.cpus import use_helper_cpus


class Prefetcher:
    """Prepares one micro-batch ahead. A batch depends only on its samples, so it can be prepared at any time.

    Args:
        batches: makes the batches. If it encodes images or captions on the training device, no batch is prepared ahead.
    """

    def __init__(self, batches: BatchMaker) -> None:
        self._batches = batches
        self._pool: ThreadPoolExecutor | None = None
        if not _is_live(batches):
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch", initializer=use_helper_cpus)
        self._ahead: tuple[tuple[SampleRef, ...], Future[Batch]] | None = None
        self.waited_seconds = 0.0
        """Total time that the loop has waited for batches."""

    @property
    def source(self) -> SampleSet:
        """The data set of the samples."""
        return self._batches.source

    def split(self, refs: Sequence[SampleRef], size: int) -> list[list[SampleRef]]:
        """Split samples into micro-batches of at most `size` samples of one shape, in their order."""
        by_shape: dict[Size, list[SampleRef]] = {}
        for ref in refs:
            by_shape.setdefault(self._batches.shape(ref.index), []).append(ref)
        return [group[start : start + size] for group in by_shape.values() for start in range(0, len(group), size)]

    def take(self, refs: Sequence[SampleRef], then: Sequence[SampleRef]) -> Batch:
        """Return the micro-batch of these samples, and start to prepare that of `then`."""
        began = time.monotonic()
        ahead, self._ahead = self._ahead, None
        is_ready = ahead is not None and ahead[0] == tuple(refs)
        batch = ahead[1].result() if ahead is not None and is_ready else self._batches.make(refs)
        self.waited_seconds += time.monotonic() - began
        if self._pool is not None and then:
            self._ahead = (tuple(then), self._pool.submit(self._batches.make, then))
        return batch


def _is_live(batches: BatchMaker) -> bool:
    latents = batches.latents.parts if isinstance(batches.latents, MixedLatents) else [batches.latents]
    return isinstance(batches.text, LiveTexts) or any(isinstance(each, LiveLatents) for each in latents)
