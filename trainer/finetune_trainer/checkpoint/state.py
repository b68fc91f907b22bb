"""The state of a run: what a checkpoint holds, and how it is saved and restored."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finetune_trainer.checkpoint.snapshot import Snapshot
from finetune_trainer.errors import ConfigError
from finetune_trainer.optim.ema import Ema
from finetune_trainer.optim.flat_optimizer import StepOptimizer
from finetune_trainer.optim.loss_scale import LossScale

WEIGHTS_MISMATCH = (
    "training: the checkpoints of this job hold other weights than training defines now; undo the change, or create "
    "a new job"
)
START_MISMATCH = "checkpoint.from: the checkpoint holds other weights than training defines"
START_REMEDY = (
    "write the method, rank, target modules and base of its job, or leave checkpoint.from out and start from its "
    "outputs"
)
NUM_LOSSES = 20
"""Number of global batches that the reported loss is averaged over."""
FIRST_STEP = "first_step"
_LOSS_SCALE = "lossScale"
_COUNT = "#count"
"""Suffix of optimizer values that are plain integers."""


@dataclass
class TrainState:
    """All values that change during training.

    Attributes:
        parameters: the trained parameters, by name.
        optimizer: their optimizer.
        ema: their moving average, or None.
        step: number of finished optimizer steps.
        losses: mean losses of the last global batches.
        loss_scale: the loss scale in fp16, else None.
    """

    parameters: Mapping[str, nn.Parameter]
    optimizer: StepOptimizer
    ema: Ema | None = None
    step: int = 0
    first_step: int = 0
    """Step of another job's checkpoint that the run started from; 0 for the first step."""
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_LOSSES))
    loss_scale: LossScale | None = None
    refresh: Callable[[], None] = lambda: None
    """Updates the working copies of the parameters after they have changed; see `Method.refresh`."""
    update_lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while the parameters are not those of the last finished step. Another thread that holds it may read them."""
    torn: bool = False
    """Whether an update failed in the middle, so that the parameters belong to no step."""

    is_sharded: ClassVar[bool] = False
    """Whether a rank holds only a part of the state."""

    @property
    def mean_loss(self) -> float:
        """Return the mean loss over the last global batches; NaN before the first."""
        return sum(self.losses) / len(self.losses) if self.losses else float("nan")

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """Guard the block that changes the state from one step to the next."""
        with self.update_lock:
            self.torn = True
            yield
            self.torn = False

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this block the parameters hold their moving average, if one is kept."""
        if self.ema is None:
            yield
            return
        with self.update_lock:
            try:
                with self.ema.applied():
                    self.refresh()
                    yield
            finally:
                self.refresh()

    def exported(self, *, averaged: bool = True) -> contextlib.AbstractContextManager[None]:
        """Return the context in which rank 0 writes the outputs. All ranks enter it.

        Args:
            averaged: whether the parameters hold their moving average, if one is kept.
        """
        return self.averaged() if averaged else contextlib.nullcontext()

    def snapshot(self, about: Mapping[str, Any]) -> Snapshot:
        """Return the state as a checkpoint holds it.

        Args:
            about: further values of state.json that describe the run.
        """
        tensors: dict[str, Mapping[str, Tensor]] = {
            "model": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "optimizer": self._optimizer_tensors(),
        }
        if self.ema is not None:
            tensors["ema"] = self.ema.tensors
        values = {**about, "step": self.step, FIRST_STEP: self.first_step, "losses": list(self.losses)}
        if self.loss_scale is not None:
            values[_LOSS_SCALE] = self.loss_scale.values()
        return Snapshot(self.step, tensors, values)

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Restore the state from a checkpoint.

        Raises:
            ConfigError: the checkpoint holds other weights than the run specification defines.
        """
        if self._misfit(snapshot) or (self.ema is not None and "ema" not in snapshot.tensors):
            raise ConfigError(WEIGHTS_MISMATCH)
        self._restore_weights(snapshot)
        self._restore_optimizer_state(snapshot)
        self._restore_values(snapshot.step, snapshot.values)
        self.first_step = int(snapshot.values.get(FIRST_STEP, 0))

    @torch.no_grad()
    def start_from(self, snapshot: Snapshot, with_optimizer: bool) -> None:
        """Start from the checkpoint of another job, at its step.

        Args:
            snapshot: the checkpoint.
            with_optimizer: whether the optimizer's state fits.

        Raises:
            ConfigError: the checkpoint holds other weights than the run specification defines.
        """
        if misfit := self._misfit(snapshot):
            raise ConfigError(f"{START_MISMATCH}: {misfit}; {START_REMEDY}")
        self._restore_weights(snapshot)
        if with_optimizer:
            self._restore_optimizer_state(snapshot)
        self._restore_values(snapshot.step, snapshot.values)
        self.first_step = snapshot.step

    def _restore_weights(self, snapshot: Snapshot) -> None:
        """Restore the parameters and their average. Without a saved average, it starts with the parameters."""
        weights = snapshot.tensors["model"]
        averages = snapshot.tensors.get("ema", weights)
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])
            self.optimizer.state[parameter] = {}
            if self.ema is not None:
                self.ema.tensors[name].copy_(averages[name])
        self.refresh()

    def _restore_optimizer_state(self, snapshot: Snapshot) -> None:
        # An optimizer without state has no tensors, so it has no file.
        for name, value in snapshot.tensors.get("optimizer", {}).items():
            owner, _, key = name.rpartition(".")
            parameter = self.parameters[owner]
            # A copy, because the value may be a view of a memory-mapped file.
            kept = int(value) if key.endswith(_COUNT) else value.to(parameter.device, copy=True)
            self.optimizer.state[parameter][key.removesuffix(_COUNT)] = kept

    def _restore_values(self, step: int, values: Mapping[str, Any]) -> None:
        self.step = step
        self.losses.clear()
        self.losses.extend(values["losses"])
        if self.loss_scale is not None and _LOSS_SCALE in values:
            self.loss_scale.restore(values[_LOSS_SCALE])

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}" if isinstance(value, Tensor) else f"{name}.{key}{_COUNT}": torch.as_tensor(value)
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state[parameter].items()
        }

    def _misfit(self, snapshot: Snapshot) -> str:
        """Return how the weights of a checkpoint differ from those that are trained; empty if they do not."""
        have = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        found = {name: tuple(value.shape) for name, value in snapshot.tensors.get("model", {}).items()}
        return describe_misfit(have, found)


def describe_misfit(trained: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    """Return the first difference between the shapes of weights; empty if there is none.

    Args:
        trained: shapes of the weights that are trained, by name.
        found: shapes of the weights of a checkpoint.
    """
    for name in sorted(trained.keys() | found.keys()):
        if name not in found:
            return f"it lacks {name}"
        if name not in trained:
            return f"it holds {name}, which is not trained"
        if trained[name] != found[name]:
            return f"{name} has the shape {list(found[name])} there and {list(trained[name])} here"
    return ""
