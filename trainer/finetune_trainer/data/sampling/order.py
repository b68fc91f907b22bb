"""The order of the samples: an endless stream of positions, each of which maps to an epoch and a sample.

The order is counter-based: the sample at position p is computed without iterating to it. A resumed run, or a run on
another number of ranks, therefore trains on the same samples in the same order. The only state is the seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

_MASK64 = (1 << 64) - 1
_NUM_ROUNDS = 6


@dataclass(frozen=True)
class SampleRef:
    """One use of a sample: its index, and the epoch. All random draws for it are keyed by both."""

    epoch: int
    index: int


def sample_at(seed: int, num_samples: int, position: int) -> SampleRef:
    """Return the sample at a position of the stream. Each epoch has every sample once, in its own order."""
    epoch, offset = divmod(position, num_samples)
    return SampleRef(epoch, permute(_mix(seed ^ _mix(epoch)), num_samples, offset))


def permute(key: int, size: int, index: int) -> int:
    """Return the image of `index` under the permutation of range(size) that `key` selects.

    A balanced Feistel network permutes the range of the next power of four. It is applied again while the result is
    outside range(size), which makes it a permutation of range(size) (cycle walking; Black and Rogaway, "Ciphers with
    arbitrary finite domains", 2002). It takes fewer than four applications on average, and no table for any size.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    half_mask = (1 << half_bits) - 1
    value = index
    while True:
        left, right = value >> half_bits, value & half_mask
        for number in range(_NUM_ROUNDS):
            left, right = right, left ^ (_mix(key + number * 0x9E3779B97F4A7C15 + right) & half_mask)
        value = left << half_bits | right
        if value < size:
            return value


def rank_share(step: int, global_batch: int, rank: int, world_size: int) -> range:
    """Return the positions of the stream that a rank trains on in a step.

    They are contiguous, and the shares of two ranks differ in length by at most one. The shares of all ranks together
    are exactly the positions from step * global_batch to (step + 1) * global_batch, exclusive.
    """
    first = step * global_batch
    return range(first + rank * global_batch // world_size, first + (rank + 1) * global_batch // world_size)


def micro_batches(positions: range, batch_size: int) -> Iterator[range]:
    """Split a share into ranges of `batch_size` positions; the last one may be shorter."""
    for start in range(0, len(positions), batch_size):
        yield positions[start : start + batch_size]


def most_micro_batches(global_batch: int, world_size: int, batch_size: int) -> int:
    """Return the number of micro-batches per step of the rank with the largest share."""
    return math.ceil(math.ceil(global_batch / world_size) / batch_size)


def total_steps(steps: int | None, epochs: int | None, num_samples: int, global_batch: int) -> int:
    """Return the number of optimizer steps: `steps`, or enough to train on every sample `epochs` times."""
    if steps is not None:
        return steps
    assert epochs is not None
    return -(-epochs * num_samples // global_batch)


def ends_epochs(step: int, num_samples: int, global_batch: int, epochs: int) -> bool:
    """Return whether a step is the first one at or after the end of the nth epoch, for any multiple n of `epochs`."""
    length = epochs * num_samples
    return step * global_batch // length > (step - 1) * global_batch // length


def _mix(value: int) -> int:
    """Scatter the bits of a 64-bit number (the finaliser of SplitMix64)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK64
    return value ^ value >> 31
