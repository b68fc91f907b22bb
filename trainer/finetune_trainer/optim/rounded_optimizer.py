"""Training of bf16 weights without fp32 weights: each update is computed in fp32 and rounded stochastically.

One flat tensor at a time is converted to fp32, updated and rounded, so that only a small part of the weights exists in
fp32. The gradients are fp32, and the optimizer's state is that of fp32 weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from finetune_trainer.optim.flat import flat_groups
from finetune_trainer.optim.rounding import StochasticRounding

_STEP = "step"

Build = Callable[[list[list[nn.Parameter]]], torch.optim.Optimizer]


@dataclass(frozen=True)
class _Part:
    """Parameters that are updated together.

    Attributes:
        members: the parameters, bf16 or fp32.
        stand_ins: what the optimizer updates in place of each; they have values only during an update.
        group: index of the optimizer's group.
    """

    members: list[nn.Parameter]
    stand_ins: list[nn.Parameter]
    group: int


class RoundedOptimizer:
    """Updates bf16 weights; see `StepOptimizer`.

    Args:
        parameters: all parameters, in the order of their gradients.
        groups: index of the optimizer's group of each parameter.
        build: returns the optimizer of groups of tensors. It must update each tensor independently of the others.
        rounding: rounds the updated weights.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], groups: Sequence[int], build: Build, rounding: StochasticRounding
    ) -> None:
        self._rounding = rounding
        self._parts = [
            _Part(members, [_stand_in(member) for member in members], group)
            for group, members in flat_groups(parameters, groups)
        ]
        of_group: list[list[nn.Parameter]] = [[] for _ in range(max(groups) + 1)]
        for part in self._parts:
            of_group[part.group] += part.stand_ins
        self._inner = build(of_group)
        stand_ins = {
            member: stand_in
            for part in self._parts
            for member, stand_in in zip(part.members, part.stand_ins, strict=True)
        }
        self._state = _StateByMember(self._inner.state, stand_ins)
        self._num_steps = 0
        self._gradients: dict[nn.Parameter, Tensor] = {}
        largest = max(sum(member.numel() for member in part.members) for part in self._parts)
        self._fp32 = torch.empty(largest, dtype=torch.float32, device=parameters[0].device)
        self._bf16 = torch.empty_like(self._fp32, dtype=torch.bfloat16)

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The optimizer of the fp32 stand-ins."""
        return self._inner

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of tensors with their settings."""
        return self._inner.param_groups

    @property
    def state(self) -> MutableMapping[Any, Any]:
        """The state of each parameter."""
        return self._state

    def attach(self, gradients: Mapping[nn.Parameter, Tensor]) -> None:
        """Use these fp32 gradients, which stay at their addresses.

        Args:
            gradients: the gradient of each parameter.
        """
        self._gradients = dict(gradients)

    @torch.no_grad()
    def step(self) -> None:
        """Take one step with the attached gradients."""
        if self._state.is_replaced:
            self._num_steps = self._read_num_steps()
            self._state.is_replaced = False
        complete = [group["params"] for group in self.param_groups]
        try:
            for number, part in enumerate(self._parts):
                self._update(part, number)
        finally:
            for group, parameters in zip(self.param_groups, complete, strict=True):
                group["params"] = parameters
        self._num_steps += 1

    def _read_num_steps(self) -> int:
        """Return the number of finished steps from the optimizer's state. It waits for the device."""
        return int(self._inner.state[self._parts[0].stand_ins[0]].get(_STEP, 0))

    def _update(self, part: _Part, number: int) -> None:
        sizes = [member.numel() for member in part.members]
        fp32, bf16 = self._fp32[: sum(sizes)], self._bf16[: sum(sizes)]
        values = _views(fp32, part.members, sizes)
        exact, low = ([_is_fp32(member) is wanted for member in part.members] for wanted in (True, False))
        members = [member.detach() for member in part.members]
        for chosen in (exact, low):
            _copy(compress(values, chosen), compress(members, chosen))
        for member, stand_in, value in zip(part.members, part.stand_ins, values, strict=True):
            stand_in.data = value
            stand_in.grad = self._gradients[member]
        for index, group in enumerate(self.param_groups):
            group["params"] = part.stand_ins if index == part.group else []
        self._inner.step()
        _copy(compress(members, exact), compress(values, exact))
        self._rounding.round_(fp32, self._num_steps, number)
        bf16.copy_(fp32)
        _copy(compress(members, low), compress(_views(bf16, part.members, sizes), low))
        for stand_in in part.stand_ins:
            stand_in.grad = None
            stand_in.data = self._fp32[:0]


class _StateByMember(MutableMapping[Any, Any]):
    """The state of the stand-ins, by parameter."""

    def __init__(self, state: MutableMapping[Any, Any], stand_ins: Mapping[nn.Parameter, nn.Parameter]) -> None:
        self._state, self._stand_ins = state, stand_ins
        self.is_replaced = False
        """Whether the state was replaced, e.g. by that of a checkpoint."""

    def __getitem__(self, parameter: nn.Parameter) -> Any:
        return self._state[self._stand_ins[parameter]]

    def __setitem__(self, parameter: nn.Parameter, values: Any) -> None:
        self._state[self._stand_ins[parameter]] = values
        self.is_replaced = True

    def __delitem__(self, parameter: nn.Parameter) -> None:
        del self._state[self._stand_ins[parameter]]

    def __iter__(self) -> Iterator[nn.Parameter]:
        return iter(self._stand_ins)

    def __len__(self) -> int:
        return len(self._stand_ins)


def _copy(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Copy tensors in few launches: GPUs need one format of all sources for this."""
    if into := list(targets):
        torch._foreach_copy_(into, list(sources))


def _stand_in(member: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty(0, dtype=torch.float32, device=member.device))


def _views(flat: Tensor, members: Sequence[nn.Parameter], sizes: list[int]) -> list[Tensor]:
    return [part.view(member.shape) for part, member in zip(torch.split(flat, sizes), members, strict=True)]


def _is_fp32(member: nn.Parameter) -> bool:
    return member.dtype is torch.float32
