"""The state of a run: what a checkpoint holds, and how it goes in and out of it."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finetune_trainer.checkpoint.snapshot import Snapshot
from finetune_trainer.errors import ConfigError
from finetune_trainer.optim.ema import Ema
from finetune_trainer.optim.loss_scale import LossScale

OTHER_WEIGHTS = (
    "training: the checkpoints of this job hold other weights than training asks for now; undo the change, or make a "
    "new job"
)
NUM_LOSSES = 20
"""The reported loss is the mean over so many global batches."""
_LOSS_SCALE = "lossScale"
_COUNT = "#count"
"""Behind the name of what an optimizer keeps as a plain integer."""


@dataclass
class TrainState:
    """Everything that changes while training.

    Attributes:
        parameters: what is trained, by name.
        optimizer: its optimizer.
        ema: its moving average, or None.
        step: finished optimizer steps.
        losses: mean losses of the last global batches.
        loss_scale: the loss's scale in fp16, else None.
    """

    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: Ema | None = None
    step: int = 0
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_LOSSES))
    loss_scale: LossScale | None = None
    whole: threading.Lock = field(default_factory=threading.Lock)
    """Held while the parameters are not those of the last finished step; whoever else holds it may read them."""
    torn: bool = False
    """An update broke off in the middle: the parameters are of no step."""

    is_sharded: ClassVar[bool] = False
    """Whether a rank holds only a part of it."""

    @property
    def mean_loss(self) -> float:
        """Mean loss over the last global batches; NaN before the first."""
        return sum(self.losses) / len(self.losses) if self.losses else float("nan")

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """The block that takes the state from one step to the next."""
        with self.whole:
            self.torn = True
            yield
            self.torn = False

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this block the parameters hold their moving average, where one is kept."""
        if self.ema is None:
            yield
            return
        with self.whole, self.ema.in_place():
            yield

    def exported(self) -> contextlib.AbstractContextManager[None]:
        """The block in which rank 0 writes the outputs. All ranks enter it."""
        return self.averaged()

    def snapshot(self, about: Mapping[str, Any]) -> Snapshot:
        """The state as a checkpoint holds it.

        Args:
            about: what else a reader of state.json wants to know.
        """
        tensors: dict[str, Mapping[str, Tensor]] = {
            "model": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "optimizer": self._optimizer_tensors(),
        }
        if self.ema is not None:
            tensors["ema"] = self.ema.tensors
        values = {**about, "step": self.step, "losses": list(self.losses)}
        if self.loss_scale is not None:
            values[_LOSS_SCALE] = self.loss_scale.values()
        return Snapshot(self.step, tensors, values)

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a checkpoint.

        Raises:
            ConfigError: it is of another model than the run specification asks for.
        """
        self._check(snapshot)
        for name, parameter in self.parameters.items():
            parameter.copy_(snapshot.tensors["model"][name])
            self.optimizer.state[parameter] = {}
        # An optimizer without state has no tensors, and so no file.
        for name, value in snapshot.tensors.get("optimizer", {}).items():
            owner, _, key = name.rpartition(".")
            parameter = self.parameters[owner]
            # A clone, for what was read may be a view into a mapped file.
            kept = int(value) if key.endswith(_COUNT) else value.to(parameter.device, copy=True)
            self.optimizer.state[parameter][key.removesuffix(_COUNT)] = kept
        if self.ema is not None:
            for name, average in self.ema.tensors.items():
                average.copy_(snapshot.tensors["ema"][name])
        self.step = snapshot.step
        self.losses.clear()
        self.losses.extend(snapshot.values["losses"])
        if self.loss_scale is not None and _LOSS_SCALE in snapshot.values:
            self.loss_scale.restore(snapshot.values[_LOSS_SCALE])

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}" if isinstance(value, Tensor) else f"{name}.{key}{_COUNT}": torch.as_tensor(value)
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state[parameter].items()
        }

    def _check(self, snapshot: Snapshot) -> None:
        have = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        found = {name: tuple(value.shape) for name, value in snapshot.tensors.get("model", {}).items()}
        if have != found or (self.ema is not None and "ema" not in snapshot.tensors):
            raise ConfigError(OTHER_WEIGHTS)
