"""The state of sharded training: each rank holds its slices, and a checkpoint holds the slices of all ranks."""

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
from finetune_trainer.checkpoint.state import (
    FIRST_STEP,
    START_MISMATCH,
    START_REMEDY,
    WEIGHTS_MISMATCH,
    TrainState,
    describe_misfit,
)
from finetune_trainer.distributed.sharding import Shards
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import ConfigError
from finetune_trainer.optim.ema import Ema
from finetune_trainer.optim.optimizer import make_optimizer

_STEP = "step"
"""AdamW's step count, the only value of its state that is not a slice."""


@dataclass
class ShardedState(TrainState):
    """See TrainState; `parameters` are this rank's slices.

    Attributes:
        offsets: start of each slice in the complete tensor.
        shapes: shapes of the complete tensors.
        shards: gathers the weights; None if a single rank holds the complete weights.
        writes_common: whether this rank writes the values that are the same on all ranks.
    """

    offsets: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    shards: Shards | None = None
    writes_common: bool = True

    is_sharded: ClassVar[bool] = True

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """See TrainState. Within this block every rank also holds all weights. All ranks enter it."""
        with super().averaged(), contextlib.nullcontext() if self.shards is None else self.shards.gathered():
            yield

    @contextlib.contextmanager
    def exported(self, *, averaged: bool = True) -> Iterator[None]:
        """See TrainState. Within this block rank 0 also holds complete modules. All ranks enter it."""
        weights = super().averaged() if averaged else contextlib.nullcontext()
        with weights, contextlib.nullcontext() if self.shards is None else self.shards.unsharded():
            yield

    def snapshot(self, about: Mapping[str, Any]) -> Snapshot:
        """Return this rank's slices with their offsets; rank 0 also returns the values that all ranks share."""
        tensors: dict[str, Tensor] = {}
        offsets: dict[str, tuple[int, ...]] = {}
        for group, name, tensor in self._slices():
            if tensor.dim() == 0:
                if self.writes_common:
                    # ShardReader needs a first dimension.
                    tensors[f"{group}{name}"], offsets[f"{group}{name}"] = tensor.view(1), (0,)
            elif tensor.numel() > 0:
                tensors[f"{group}{name}"] = tensor
                offsets[f"{group}{name}"] = self.offsets[self._owner(name)]
        values = {**about, "step": self.step, FIRST_STEP: self.first_step, "losses": list(self.losses)}
        return Snapshot(self.step, {GROUP: tensors} if tensors else {}, values, offsets)

    @torch.no_grad()
    def restore_shards(self, reader: ShardReader, values: Mapping[str, Any]) -> None:
        """Restore the state from a checkpoint that any number of ranks wrote.

        Raises:
            ConfigError: the checkpoint holds other weights than the run specification defines.
            StorageError: the checkpoint can no longer be read.
        """
        if self._misfit_of(reader) or _has_ema(reader) != (self.ema is not None):
            raise ConfigError(WEIGHTS_MISMATCH)
        self._read(reader, values)
        self.first_step = int(values.get(FIRST_STEP, 0))

    @torch.no_grad()
    def start_from_shards(self, reader: ShardReader, values: Mapping[str, Any]) -> None:
        """Start from the checkpoint of another job, at its step; see `start_from`.

        Raises:
            ConfigError: the checkpoint holds other weights than the run specification defines.
            StorageError: the checkpoint can no longer be read.
        """
        if misfit := self._misfit_of(reader):
            raise ConfigError(f"{START_MISMATCH}: {misfit}; {START_REMEDY}")
        self._read(reader, values)
        self.first_step = self.step

    def _misfit_of(self, reader: ShardReader) -> str:
        """Return how the weights of a checkpoint differ from those that are trained; empty if they do not."""
        found = {name: reader.shape(name) for name in reader.names if name.startswith("model.")}
        return describe_misfit({f"model.{name}": shape for name, shape in self.shapes.items()}, found)

    def _read(self, reader: ShardReader, values: Mapping[str, Any]) -> None:
        average_group = "ema" if _has_ema(reader) else "model"
        for name, parameter in self.parameters.items():
            parameter.copy_(reader.read(f"model.{name}", self.offsets[name], parameter))
            self.optimizer.state[parameter] = {}
            if self.ema is not None:
                average = self.ema.tensors[name]
                average.copy_(reader.read(f"{average_group}.{name}", self.offsets[name], average))
        for name in reader.names:
            if name.startswith("optimizer."):
                owner, _, key = name.removeprefix("optimizer.").rpartition(".")
                self._restore_optimizer(reader, name, owner, key)
        self._restore_values(int(values["step"]), values)

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
        """Return the parameter that a tensor belongs to, e.g. x.weight for x.weight.exp_avg."""
        return name if name in self.offsets else name.rpartition(".")[0]


def _has_ema(reader: ShardReader) -> bool:
    return any(name.startswith("ema.") for name in reader.names)


def make_sharded_state(
    training: TrainingSpec, world: World, parameters: Mapping[str, nn.Parameter], shards: Shards | None
) -> ShardedState:
    """Return a rank's state before the first step.

    Args:
        training: the training settings.
        world: the ranks.
        parameters: this rank's slices; the complete tensors if a single rank trains.
        shards: the sharding of the tensors; None if a single rank trains.
    """
    complete = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    return ShardedState(
        parameters,
        make_optimizer(training, parameters),
        Ema(parameters) if training.ema else None,
        offsets=shards.offsets if shards else {name: (0,) * len(shape) for name, shape in complete.items()},
        shapes=shards.shapes if shards else complete,
        shards=shards,
        writes_common=world.is_first,
    )
