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
from torch import Tensor, nn

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
        if any(not parameter.is_cpu for group in self.param_groups for parameter in group["params"][:1]):
            self._step_on_device()
            return
        rates = [group["lr"] for group in self.param_groups]
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate / _SCALE
        try:
            super().step()  # type: ignore[no-untyped-call]
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate

    @torch.no_grad()
    def _step_on_device(self) -> None:
        """Take the same step with numbers that stay on the device: torch reads the norm of each update on the host."""
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(_fresh_state(gradient))
                weight = state["step"].add_(1) ** group["beta2_decay"]
                parameter.mul_(1 - group["lr"] / _SCALE * group["weight_decay"])
                update = _scaled(gradient, state, weight)
                norm = torch.linalg.vector_norm(update) / (update.numel() ** 0.5 * group["d"])
                parameter.sub_(update.mul_(group["lr"] / norm.clamp_(min=1.0)))


def _fresh_state(gradient: Tensor) -> dict[str, Tensor]:
    """Return the state before the first step, with torch's names: second moments per row and column of a matrix."""
    step = {"step": gradient.new_zeros(())}
    if gradient.dim() < 2:
        return step | {"variance": torch.zeros_like(gradient)}
    rows, columns = gradient.select(-1, 0).unsqueeze(-1), gradient.select(-2, 0).unsqueeze(-2)
    return step | {"row_var": torch.zeros_like(rows), "col_var": torch.zeros_like(columns)}


def _scaled(gradient: Tensor, state: dict[str, Tensor], weight: Tensor) -> Tensor:
    """Update the second moments, and return the gradient divided by their root.

    Args:
        gradient: the gradient.
        state: the second moments.
        weight: weight of this step in them (scalar).
    """
    smallest = torch.finfo(gradient.dtype).eps
    if gradient.dim() < 2:
        moment = state["variance"].lerp_(gradient.square(), weight).clone()
    else:
        for name, dim in (("row_var", -1), ("col_var", -2)):
            means = torch.linalg.vector_norm(gradient, dim=dim, keepdim=True).square_().div_(gradient.shape[dim])
            state[name].lerp_(means, weight)
        moment = state["row_var"] @ state["col_var"]
        moment.div_(state["row_var"].mean(dim=-2, keepdim=True).clamp_(min=smallest))
    return moment.clamp_(min=smallest**2).rsqrt_().mul_(gradient)
