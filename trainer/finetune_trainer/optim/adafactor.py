"""Adafactor (https://arxiv.org/abs/1804.04235) with the learning rate that is given, as AdamW uses it.

The paper multiplies the learning rate by the root mean square of each weight matrix and limits it to 1 / sqrt(step).
With the learning rates of AdamW, matrices that start at zero (adapters, the outputs of a ControlNet) or small then
hardly change. This form takes the learning rate unchanged. The second moments per row and column and the clipping of
the update are those of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

_SCALE = 2.0**40
"""A lower bound of the parameter scale that no weights reach. A power of two, so that multiplying by it is exact."""


class Adafactor(torch.optim.Adafactor):
    """torch's Adafactor without parameter scaling and relative steps; its state has the same form.

    torch's step is max(eps2, RMS(weight)) * min(lr, 1 / sqrt(step)). With eps2 = _SCALE and lr / _SCALE it is lr.
    """

    def __init__(
        self, params: Iterable[nn.Parameter] | Iterable[dict[str, Any]], lr: float, weight_decay: float = 0.0
    ) -> None:
        # torch multiplies the weight decay by the learning rate that it is given.
        super().__init__(params, lr=lr, eps=(None, _SCALE), weight_decay=weight_decay * _SCALE)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step with the current gradients."""
        assert closure is None
        rates = [group["lr"] for group in self.param_groups]
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate / _SCALE
        try:
            super().step()  # type: ignore[no-untyped-call]
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate
