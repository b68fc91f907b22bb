"""Prodigy (https://arxiv.org/abs/2306.06101), in its Adam form: an optimizer that finds its own step size.

The distance from the start to a solution is estimated during training, and replaces a learning rate that the user would
have to search for. The manifest's learning rate is a factor of the step size; 1 is the recommended value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

FIRST_DISTANCE = 1e-6
"""Initial estimate of the distance; it never decreases."""
_DISTANCE = "distance"
_NUMERATOR = "numerator"


class Prodigy(torch.optim.Optimizer):
    """Algorithm 4 of the paper, with decoupled weight decay. Its state consists of tensors of its parameters only."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(list(params), {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        if len(self.param_groups) != 1:
            raise ValueError("one distance is estimated for all parameters: pass them as one group")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step with the current gradients."""
        assert closure is None
        (group,) = self.param_groups
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter].update(_fresh_state(parameter))
        common = next(
            (self.state[each] for each in parameters if _DISTANCE in self.state[each]), self.state[parameters[0]]
        )
        if _DISTANCE not in common:
            # Stored in the first parameter's state, so that a checkpoint includes them like all other state.
            like = {"dtype": torch.float32, "device": parameters[0].device}
            common[_DISTANCE] = torch.tensor(FIRST_DISTANCE, **like)
            common[_NUMERATOR] = torch.tensor(0.0, **like)
        if not parameters[0].is_cpu:
            self._step_on_device(parameters, group, common)
            return
        distance = float(common[_DISTANCE])
        growth = self._update_moments(parameters, group, distance)
        common[_NUMERATOR].mul_(math.sqrt(group["betas"][1])).add_(growth)
        reached = torch.stack([self.state[parameter]["sum"].abs().sum() for parameter in parameters]).sum()
        if float(reached) > 0:
            common[_DISTANCE].copy_(torch.maximum(common[_DISTANCE], common[_NUMERATOR] / reached))
        for parameter in parameters:
            _move(parameter, self.state[parameter], group, distance)

    def _step_on_device(self, parameters: list[nn.Parameter], group: dict[str, Any], common: dict[str, Tensor]) -> None:
        """Take a step whose numbers stay on the device: the host would wait for each that it reads."""
        beta1, beta2 = group["betas"]
        slow = math.sqrt(beta2)
        distance = common[_DISTANCE].double()
        weight = (1 - slow) * group["lr"] * distance**2
        rate = group["lr"] * distance
        products, sums = [], []
        for parameter in parameters:
            state, gradient = self.state[parameter], parameter.grad
            assert gradient is not None
            products.append((state["start"] - parameter).mul_(gradient).sum())
            state["exp_avg"].mul_(beta1).add_(gradient * ((1 - beta1) * distance))
            state["exp_avg_sq"].mul_(beta2).add_(gradient.square().mul_((1 - beta2) * distance**2))
            state["sum"].mul_(slow).add_(gradient * weight)
            sums.append(state["sum"].abs().sum())
            parameter.mul_(1 - rate * group["weight_decay"])
            divisor = state["exp_avg_sq"].sqrt().add_(distance * group["eps"])
            parameter.sub_((state["exp_avg"] / divisor).mul_(rate))
        common[_NUMERATOR].mul_(slow).add_(torch.stack(products).sum() * weight)
        reached = torch.stack(sums).sum()
        found = torch.where(reached > 0, common[_NUMERATOR] / reached, common[_DISTANCE])
        common[_DISTANCE].copy_(torch.maximum(common[_DISTANCE], found))

    def _update_moments(self, parameters: list[nn.Parameter], group: dict[str, Any], distance: float) -> Tensor:
        """Update the moments, and return the increase of the estimate's numerator."""
        beta1, beta2 = group["betas"]
        slow = math.sqrt(beta2)
        weight = (1 - slow) * group["lr"] * distance**2
        products = []
        for parameter in parameters:
            state, gradient = self.state[parameter], parameter.grad
            assert gradient is not None
            products.append(torch.dot(gradient.flatten(), (state["start"] - parameter).flatten()))
            state["exp_avg"].mul_(beta1).add_(gradient, alpha=(1 - beta1) * distance)
            state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=(1 - beta2) * distance**2)
            state["sum"].mul_(slow).add_(gradient, alpha=weight)
        growth: Tensor = torch.stack(products).sum() * weight
        return growth


def _fresh_state(parameter: nn.Parameter) -> dict[str, Tensor]:
    zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq", "sum")}
    return {"start": parameter.detach().clone(), **zeros}


def _move(parameter: nn.Parameter, state: dict[str, Tensor], group: dict[str, Any], distance: float) -> None:
    rate = group["lr"] * distance
    parameter.mul_(1 - rate * group["weight_decay"])
    parameter.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(distance * group["eps"]), value=-rate)
