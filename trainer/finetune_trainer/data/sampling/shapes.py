"""The width and height at which an image is trained: the square, or the best of a few shapes of about the same area."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

Size = tuple[int, int]
"""Width and height in pixels."""

_COARSE, _FINE = 64, 8
"""Sides are multiples of the first, as in the training of the bases; of the second if the resolution is small."""
_SMALL = 256
"""Resolutions below this one are small."""
_LONGEST = 2.0
"""Largest ratio of the longer side to the shorter one."""


@dataclass(frozen=True)
class Shapes:
    """The shapes of a run.

    Attributes:
        resolution: side of the square.
        buckets: whether there are shapes other than the square.
    """

    resolution: int
    buckets: bool = False

    def of(self, size: Size) -> Size:
        """Return the width and height to train an image of this size at: the shape with the nearest aspect ratio."""
        if not self.buckets:
            return (self.resolution, self.resolution)
        ratio = math.log(size[0] / size[1])
        return min(self.all, key=lambda shape: (abs(math.log(shape[0] / shape[1]) - ratio), shape))

    @cached_property
    def all(self) -> tuple[Size, ...]:
        """All shapes, including the square; none has more pixels than the square."""
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
