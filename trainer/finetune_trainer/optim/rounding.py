"""Stochastic rounding to bf16: up or down with probabilities that keep the expected value.

A bf16 number has 8 significant bits. Rounded to the nearest number, an update of less than 1/512 of a weight is lost,
and most updates are smaller. Rounded up with the probability of its distance to the lower number, it is kept on average
(https://arxiv.org/abs/1502.02551, section 3).

The random bits are a function of seed, step and position. All ranks round equally, and a resumed run rounds as an
undisturbed one, on any device.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_CHUNK = 2**22
"""Elements that are rounded at a time."""
_NUM_OFFSETS = 2**16
_MASK = 0xFFFF
"""The bits of fp32 that bf16 does not have."""


class StochasticRounding:
    """Rounds fp32 numbers to numbers of bf16.

    Random bits come from a table: each chunk in each step reads it from a random place, and inverts random bits. So the
    bits of one element are independent in different steps.

    Args:
        seed: seed of the run.
        device: device of the numbers.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed
        generator = torch.Generator().manual_seed(_key(seed, "table"))
        table = torch.randint(0, _MASK + 1, (_CHUNK + _NUM_OFFSETS,), generator=generator, dtype=torch.int32)
        self._table = table.to(device)

    @torch.no_grad()
    def round_(self, values: Tensor, step: int, tensor: int) -> None:
        """Round numbers in place. Numbers of bf16 do not change.

        Args:
            values: fp32 (n,), contiguous.
            step: number of the step.
            tensor: number of the tensor in the step.
        """
        bits = values.view(torch.int32)
        for number, start in enumerate(range(0, len(bits), _CHUNK)):
            chunk = bits[start : start + _CHUNK]
            key = _key(self._seed, step, tensor, number)
            offset, mask = key % _NUM_OFFSETS, key // _NUM_OFFSETS & _MASK
            chunk.add_(torch.bitwise_xor(self._table[offset : offset + len(chunk)], mask))
            # The magnitude is in the lower bits, whatever the sign. What remains is a number of bf16.
            chunk.bitwise_and_(~_MASK)


def _key(*parts: object) -> int:
    """Return 63 random bits that depend on all parts."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
