"""Which width and height an image is trained at: the square, or the nearest of a few shapes of about the same area."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from finetune_trainer.data.images.decoding import Size

_COARSE, _FINE = 64, 8
"""Sides are multiples of the first, as the bases were trained; of the second where the square is smaller than this."""
_SMALL = 256
_LONGEST = 2.0
"""Longest side over shortest."""


@dataclass(frozen=True)
class Shapes:
    """The shapes of a run.

    Attributes:
        resolution: side of the square.
        buckets: whether there are others.
    """

    resolution: int
    buckets: bool = False

    def of(self, size: Size) -> Size:
        """Width and height for an image of this size: of all shapes the one with the nearest ratio."""
        if not self.buckets:
            return (self.resolution, self.resolution)
        ratio = math.log(size[0] / size[1])
        return min(self.all, key=lambda shape: (abs(math.log(shape[0] / shape[1]) - ratio), shape))

    @cached_property
    def all(self) -> tuple[Size, ...]:
        """Every shape, the square among them; none has more pixels than it."""
        if not self.buckets:
            return ((self.resolution, self.resolution),)
        step = _COARSE if self.resolution >= _SMALL else _FINE
        area = self.resolution**2
        found = {(self.resolution, self.resolution)}
        for width in range(step, 2 * self.resolution + 1, step):
            height = area // width // step * step
            if height > 0 and max(width / height, height / width) <= _LONGEST:
                found |= {(width, height), (height, width)}
        return tuple(sorted(found))
