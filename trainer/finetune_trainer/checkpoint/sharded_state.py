"""The state of sharded training: each rank has its slices of it, and a checkpoint holds the slices of all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finetune_contract.spec import TrainingSpec
from finetune_trainer.checkpoint.shards import GROUP, ShardReader
from finetune_trainer.checkpoint.snapshot import Snapshot
from finetune_trainer.checkpoint.state import OTHER_WEIGHTS, TrainState
from finetune_trainer.distributed.sharding import Shards
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import ConfigError
from finetune_trainer.optim.ema import Ema
from finetune_trainer.optim.optimizer import make_optimizer

_STEP = "step"
"""AdamW's count of its steps, the one number that is no slice."""


@dataclass
class ShardedState(TrainState):
    """See TrainState; `parameters` are this rank's slices.

    Attributes:
        offsets: where each slice begins.
        shapes: shapes of the whole tensors.
        shards: gathers the weights; None where this rank is alone and holds them whole.
        writes_common: this rank writes what all ranks hold alike.
    """

    offsets: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    shards: Shards | None = None
    writes_common: bool = True

    is_sharded: ClassVar[bool] = True

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Besides, every rank holds all weights in it. All ranks enter it."""
        with super().averaged(), contextlib.nullcontext() if self.shards is None else self.shards.gathered():
            yield

    @contextlib.contextmanager
    def exported(self) -> Iterator[None]:
        """Besides, rank 0 holds the modules that it can write. All ranks enter it."""
        with super().averaged(), contextlib.nullcontext() if self.shards is None else self.shards.whole():
            yield

    def snapshot(self, about: Mapping[str, Any]) -> Snapshot:
        """This rank's slices, with their places; numbers that all ranks hold alike are rank 0's."""
        tensors: dict[str, Tensor] = {}
        offsets: dict[str, tuple[int, ...]] = {}
        for group, name, tensor in self._slices():
            if tensor.dim() == 0:
                if self.writes_common:
                    # A reader of shards wants a first dimension.
                    tensors[f"{group}{name}"], offsets[f"{group}{name}"] = tensor.view(1), (0,)
            elif tensor.numel() > 0:
                tensors[f"{group}{name}"] = tensor
                offsets[f"{group}{name}"] = self.offsets[self._owner(name)]
        values = {**about, "step": self.step, "losses": list(self.losses)}
        return Snapshot(self.step, {GROUP: tensors} if tensors else {}, values, offsets)

    @torch.no_grad()
    def restore_shards(self, reader: ShardReader, values: Mapping[str, Any]) -> None:
        """Go on from a checkpoint that any number of ranks wrote.

        Raises:
            ConfigError: it is of another model than the run specification asks for.
            StorageError: it can no longer be read.
        """
        found = {name: reader.shape(name) for name in reader.names if name.startswith("model.")}
        has_ema = any(name.startswith("ema.") for name in reader.names)
        if found != {f"model.{name}": shape for name, shape in self.shapes.items()} or has_ema != (
            self.ema is not None
        ):
            raise ConfigError(OTHER_WEIGHTS)
        for name, parameter in self.parameters.items():
            parameter.copy_(reader.read(f"model.{name}", self.offsets[name], parameter))
            self.optimizer.state[parameter] = {}
            if self.ema is not None:
                average = self.ema.tensors[name]
                average.copy_(reader.read(f"ema.{name}", self.offsets[name], average))
        for name in reader.names:
            if name.startswith("optimizer."):
                owner, _, key = name.removeprefix("optimizer.").rpartition(".")
                self._restore_optimizer(reader, name, owner, key)
        self.step = int(values["step"])
        self.losses.clear()
        self.losses.extend(values["losses"])

    def _restore_optimizer(self, reader: ShardReader, name: str, owner: str, key: str) -> None:
        parameter = self.parameters[owner]
        if key != _STEP:
            value = reader.read(name, self.offsets[owner], parameter).to(parameter.device)
        else:
            value = reader.read(name, (0,), torch.empty(1)).to(parameter.device).view(())
        self.optimizer.state[parameter][key] = value

    def _slices(self) -> Iterator[tuple[str, str, Tensor]]:
        for name, parameter in self.parameters.items():
            yield "model.", name, parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                yield "optimizer.", f"{name}.{key}", value
            if self.ema is not None:
                yield "ema.", name, self.ema.tensors[name]

    def _owner(self, name: str) -> str:
        """The parameter that a tensor belongs to: the moments of x.weight are x.weight.exp_avg."""
        return name if name in self.offsets else name.rpartition(".")[0]


def make_sharded_state(
    training: TrainingSpec, world: World, parameters: Mapping[str, nn.Parameter], shards: Shards | None
) -> ShardedState:
    """The state of a rank before its first step.

    Args:
        parameters: its slices; of a rank that is alone, the whole.
        shards: what they are slices of; None for a rank that is alone.
    """
    whole = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    return ShardedState(
        parameters,
        make_optimizer(training, parameters.values()),
        Ema(parameters) if training.ema else None,
        offsets=shards.offsets if shards else {name: (0,) * len(shape) for name, shape in whole.items()},
        shapes=shards.shapes if shards else whole,
        shards=shards,
        writes_common=world.is_first,
    )
