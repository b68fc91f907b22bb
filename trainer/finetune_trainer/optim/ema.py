"""An exponential moving average (EMA) of the trained parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from finetune_trainer.optim.flat import FlatTensor

MAX_DECAY = 0.9999


def decay_at(step: int) -> float:
    """Return the decay at a finished step (from 1). It rises, so that the first steps lose their weight."""
    return min(MAX_DECAY, (1 + step) / (10 + step))


class Ema:
    """The average, fp32, kept in addition to the parameters.

    Args:
        parameters: the trained parameters by name.
        flats: flat tensors of all parameters; the average then has the same layout. Empty if they have none.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], flats: Sequence[FlatTensor] = ()) -> None:
        names = {parameter: name for name, parameter in parameters.items()}
        self._current = [flat.parameter.detach() for flat in flats] or [each.detach() for each in names]
        self._averages = [torch.empty_like(each, dtype=torch.float32).copy_(each) for each in self._current]
        self.tensors: dict[str, Tensor] = dict(zip(parameters, self._averages, strict=True)) if not flats else {}
        """The averaged weights, by the parameters' names."""
        for flat, average in zip(flats, self._averages if flats else [], strict=True):
            self.tensors |= dict(zip((names[each] for each in flat.members), flat.split(average), strict=True))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average with the parameters after a step."""
        weight = 1 - decay_at(step)
        fp32 = [current.dtype is torch.float32 for current in self._current]
        if all(fp32):
            torch._foreach_lerp_(self._averages, self._current, weight)
            return
        for average, current in zip(self._averages, self._current, strict=True):
            average.lerp_(current.float(), weight)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within this block the parameters hold the average, rounded to their number format."""
        kept = [self._swap(average, current) for average, current in zip(self._averages, self._current, strict=True)]
        try:
            yield
        finally:
            for average, current, weights in zip(self._averages, self._current, kept, strict=True):
                if weights is None:
                    self._swap(average, current)
                else:
                    current.copy_(weights)

    @staticmethod
    @torch.no_grad()
    def _swap(average: Tensor, current: Tensor) -> Tensor | None:
        """Give weights the values of their average.

        Values are swapped, not tensors: a parameter may share its memory with others.

        Returns:
            The weights in another format than the average's; None if the average now has their values.
        """
        kept = current.clone()
        current.copy_(average)
        if kept.dtype is not average.dtype:
            return kept
        average.copy_(kept)
        return None
