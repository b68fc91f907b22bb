"""An optimizer over flat tensors, whose state is read and written by parameter, as that of torch's optimizers.

Checkpoints hold the state of each parameter by its name. They do not depend on the flat tensors: a run may continue
with other ones, or without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from finetune_trainer.optim.flat import FlatTensor, gradient_of

_STEP = "step"
"""The only value of a parameter's state that is no tensor of its elements: the number of its steps."""


class StepOptimizer(Protocol):
    """The part of torch's optimizers that the loop and checkpoints use."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of parameters with their settings, e.g. the learning rate `lr`."""
        ...

    @property
    def state(self) -> MutableMapping[Any, Any]:
        """The state of each parameter."""
        ...

    def step(self) -> Any:
        """Take one step with the current gradients."""
        ...


class FlatOptimizer:
    """Updates flat tensors; see `StepOptimizer`.

    Args:
        parameters: all parameters; the first one's state also holds the values that all have in common.
        flats: their flat tensors.
        build: returns the optimizer of groups of tensors.
        num_groups: number of groups.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        flats: Sequence[FlatTensor],
        build: Callable[[list[list[nn.Parameter]]], torch.optim.Optimizer],
        num_groups: int,
    ) -> None:
        self.flats = list(flats)
        groups = [[flat.parameter for flat in flats if flat.group == group] for group in range(num_groups)]
        self._inner = build(groups)
        self._gradients: list[Tensor] = []
        self.state: MutableMapping[Any, Any] = FlatState(self._inner.state, parameters, flats)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of flat tensors with their settings."""
        return self._inner.param_groups

    def attach(self, gradients: Mapping[nn.Parameter, Tensor]) -> None:
        """Use these gradients, which stay at their addresses.

        Args:
            gradients: the gradient of each parameter; those of neighbours are neighbours.
        """
        self._gradients = [gradient_of(flat, [gradients[each] for each in flat.members]) for flat in self.flats]

    def step(self) -> None:
        """Take one step with the attached gradients."""
        for flat, gradient in zip(self.flats, self._gradients, strict=True):
            flat.parameter.grad = gradient
        self._inner.step()


class FlatState(MutableMapping[Any, Any]):
    """The state of each parameter, in that of the flat tensors.

    Args:
        state: the optimizer's state, by flat tensor.
        parameters: all parameters, in the order of checkpoints.
        flats: their flat tensors.
    """

    def __init__(
        self,
        state: MutableMapping[Any, dict[str, Any]],
        parameters: Sequence[nn.Parameter],
        flats: Sequence[FlatTensor],
    ) -> None:
        self._state = state
        common = flats[0].parameter
        self._places: dict[nn.Parameter, _Place] = {}
        for flat in flats:
            start = 0
            for member in flat.members:
                is_first = member is parameters[0]
                self._places[member] = _Place(state, flat.parameter, start, member, common, is_first)
                start += member.numel()

    def __getitem__(self, parameter: nn.Parameter) -> MutableMapping[str, Any]:
        return self._places[parameter]

    def __setitem__(self, parameter: nn.Parameter, values: Mapping[str, Any]) -> None:
        """Replace the state. The neighbours' states become incomplete until they are replaced, too."""
        place = self._places[parameter]
        place.reset()
        place.update(values)

    def __delitem__(self, parameter: nn.Parameter) -> None:
        self._places[parameter].reset()

    def __iter__(self) -> Iterator[nn.Parameter]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class _Place(MutableMapping[str, Any]):
    """The state of one parameter: a part of each tensor of a flat tensor's state."""

    def __init__(  # noqa: PLR0913, PLR0917  private
        self,
        state: MutableMapping[Any, dict[str, Any]],
        flat: nn.Parameter,
        start: int,
        member: nn.Parameter,
        common: nn.Parameter,
        is_first: bool,
    ) -> None:
        self._state, self._flat, self._start, self._member = state, flat, start, member
        self._common, self._is_first = common, is_first

    def reset(self) -> None:
        """Drop the state of the flat tensor."""
        self._state[self._flat] = {}
        if self._is_first:
            for key in [key for key, value in self._state[self._common].items() if self._is_common(key, value)]:
                del self._state[self._common][key]

    def __getitem__(self, key: str) -> Any:
        values = self._state[self._flat]
        if key in values and not self._is_common(key, values[key]):
            value = values[key]
            return value if key == _STEP else value[self._slice].view(self._member.shape)
        if self._is_first:
            return self._state[self._common][key]
        raise KeyError(key)

    def __setitem__(self, key: str, value: Any) -> None:
        values = self._state[self._flat]
        if key == _STEP:
            values[key] = value
        elif self._is_common(key, value):
            self._state[self._common][key] = value
        else:
            if key not in values:
                values[key] = torch.zeros(self._flat.shape, dtype=value.dtype, device=value.device)
            values[key][self._slice].view(self._member.shape).copy_(value)

    def __delitem__(self, key: str) -> None:
        raise TypeError(f"{key} is a part of the state of a flat tensor")

    def __iter__(self) -> Iterator[str]:
        values = self._state[self._flat]
        yield from (key for key, value in values.items() if not self._is_common(key, value))
        if self._is_first:
            yield from (key for key, value in self._state[self._common].items() if self._is_common(key, value))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @property
    def _slice(self) -> slice:
        return slice(self._start, self._start + self._member.numel())

    @staticmethod
    def _is_common(key: str, value: Tensor) -> bool:
        """Return whether a value belongs to all parameters: the only other scalar is the number of steps."""
        return key != _STEP and value.dim() == 0
