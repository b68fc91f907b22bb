"""Random draws of a loader's worker processes: they depend on the number of the batch, not on earlier reads.

So a resumed epoch need not read the skipped batches again to draw the same crops and flips.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data._utils.fetch import _MapDatasetFetcher

_STRIDE = 1_000_003
_MODULUS = 2**32


class NumberedIndices(list[Any]):
    """The indices of one batch, with the seed of its draws."""

    seed: int = 0


class NumberedBatches:
    """Batches of indices from a sampler, each with its seed.

    Args:
        sampler: yields the indices of each batch, or single indices if the loader does not batch.
        skip: batches that the next iteration skips.
        seed: of the iteration.
    """

    def __init__(self, sampler: Any, skip: int, seed: int) -> None:
        self.sampler = sampler
        self._skip = skip
        self._seed = seed

    def __iter__(self) -> Iterator[Any]:
        for number, indices in enumerate(self.sampler):
            if number < self._skip:
                continue
            if isinstance(indices, Iterable):
                batch = NumberedIndices(indices)
                batch.seed = (self._seed + _STRIDE * number) % _MODULUS
                yield batch
            else:
                yield indices
        self._skip = 0

    def __len__(self) -> int:
        return len(self.sampler)


class WorkerStart:
    """Prepares a worker process, then calls the function of the script.

    Args:
        script: `worker_init_fn` of the script.
    """

    def __init__(self, script: Callable[[int], None] | None) -> None:
        self._script = script

    def __call__(self, worker: int) -> None:
        """Seed each batch by its number from now on."""
        fetcher: Any = _MapDatasetFetcher
        original = fetcher.fetch

        def fetch(self: Any, indices: Any) -> Any:
            if isinstance(indices, NumberedIndices):
                random.seed(indices.seed)
                np.random.seed(indices.seed)
                torch.manual_seed(indices.seed)
            return original(self, indices)

        fetcher.fetch = fetch
        if self._script is not None:
            self._script(worker)
