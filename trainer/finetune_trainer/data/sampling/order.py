"""The order in which samples are seen: an endless stream of positions, each of which knows its epoch and sample.

Counter-based: position p of the stream is found without walking there, so a resumed run, or one on another number of
ranks, sees the same samples in the same order. Nothing is kept but the seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

_MASK64 = (1 << 64) - 1
_NUM_ROUNDS = 6


@dataclass(frozen=True)
class SampleRef:
    """One drawing of a sample: which one, and in which pass over the data set. All draws of it are keyed by both."""

    epoch: int
    index: int


def sample_at(seed: int, num_samples: int, position: int) -> SampleRef:
    """The sample at a position of the stream; every epoch holds each sample once, in an order of its own."""
    epoch, offset = divmod(position, num_samples)
    return SampleRef(epoch, permute(_mix(seed ^ _mix(epoch)), num_samples, offset))


def permute(key: int, size: int, index: int) -> int:
    """Image of `index` under the permutation of range(size) that `key` selects.

    A balanced Feistel network permutes the next power of four, and walking on while the result lies outside of the
    range makes it a permutation of the range itself (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    It takes fewer than four walks on average, and no table however large the data set is.
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
    """Positions of the stream that a rank takes in a step: contiguous, and unequal by at most one.

    The shares of all ranks are exactly positions step * global_batch .. (step + 1) * global_batch.
    """
    first = step * global_batch
    return range(first + rank * global_batch // world_size, first + (rank + 1) * global_batch // world_size)


def micro_batches(positions: range, batch_size: int) -> Iterator[range]:
    """Cut a share into runs of `batch_size` positions, the last of which may be shorter."""
    for start in range(0, len(positions), batch_size):
        yield positions[start : start + batch_size]


def most_micro_batches(global_batch: int, world_size: int, batch_size: int) -> int:
    """How many micro-batches the rank with the largest share makes in a step."""
    return math.ceil(math.ceil(global_batch / world_size) / batch_size)


def total_steps(steps: int | None, epochs: int | None, num_samples: int, global_batch: int) -> int:
    """Optimizer steps to train: as asked, or enough to see every sample `epochs` times."""
    if steps is not None:
        return steps
    assert epochs is not None
    return -(-epochs * num_samples // global_batch)


def _mix(value: int) -> int:
    """Scatter the bits of a 64-bit number (the finaliser of SplitMix64)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK64
    return value ^ value >> 31
