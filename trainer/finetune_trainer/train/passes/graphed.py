"""Passes that are captured once per shape and replayed: the host launches one graph instead of thousands of kernels.

Everything that a replayed pass reads and writes stays at fixed addresses: inputs, weights, gradients and signals. The
first passes of a shape run without a graph; their results count, and they prepare the capture. A seed is set before
each pass, as without graphs, so that dropout draws the same numbers.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from finetune_contract.spec import SwitchMode
from finetune_trainer.data.batches import Batch
from finetune_trainer.errors import ConfigError
from finetune_trainer.train.micro_batch import is_out_of_memory
from finetune_trainer.train.passes.choice import GraphChoice, GraphSchedule, Turn, must_make_room
from finetune_trainer.train.passes.eager import PassWork
from finetune_trainer.train.passes.static_batch import BatchShape, StaticBatch

_LOG = logging.getLogger(__name__)
_MAX_CAUSE = 200


class Graph(Protocol):
    """A captured computation."""

    def replay(self) -> None:
        """Run it with the values that its inputs have now."""
        ...

    def reset(self) -> None:
        """Free it."""
        ...


class GraphDevice(Protocol):
    """A device that captures computations."""

    def warm_up(self, run: Callable[[], None]) -> None:
        """Run a computation where it can be captured later."""
        ...

    def capture(self, run: Callable[[], None], generators: Sequence[torch.Generator]) -> Graph:
        """Record what a computation launches. It computes nothing.

        Args:
            run: the computation.
            generators: what it draws from, besides torch's own generator. A replay uses the seeds that they have then.

        Raises:
            RuntimeError: it cannot be captured. The device can be used as before.
        """
        ...

    def free_bytes(self) -> int:
        """Return the memory that computations without a graph can use."""
        ...

    def held_bytes(self) -> int:
        """Return the memory that only graphs can use."""
        ...

    def release(self) -> None:
        """Return memory of graphs that were reset."""
        ...


class GraphedPasses:
    """Computes passes by graphs; see `Passes`.

    Args:
        work: the computation.
        parameters: the trained parameters.
        device: captures.
        choice: an enabled choice.
        note: receives messages for the user.
    """

    def __init__(
        self,
        work: PassWork,
        parameters: Iterable[nn.Parameter],
        device: GraphDevice,
        choice: GraphChoice,
        note: Callable[[str], None],
    ) -> None:
        self._work, self._device, self._note = work, device, note
        self._parameters = list(parameters)
        self._choice = choice
        self._schedule = GraphSchedule()
        self._inputs: dict[BatchShape, StaticBatch] = {}
        self._graphs: dict[BatchShape, Graph] = {}
        self._addresses: list[int] = []
        self._scale: Tensor | None = None

    @property
    def choice(self) -> GraphChoice:
        """Whether passes are replayed as CUDA graphs, and why not."""
        return self._choice

    def run(self, batch: Batch, seed: int, loss_scale: float, is_last: bool) -> None:
        """Add the gradients, losses and counts of a micro-batch to those of the step.

        Raises:
            ConfigError: the manifest requires graphs, and the pass cannot be captured.
        """
        batch = self._work.method.prepare(batch)
        if not self._choice.enabled:
            self._run_eagerly(batch, seed, loss_scale, is_last)
            return
        self._work.gradients.hold()
        is_eager = is_last and self._choice.is_last_eager
        shape = BatchShape.of(batch)
        turn = Turn.EAGER if is_eager else self._schedule.next_turn(shape)
        if turn is Turn.EAGER:
            self._device.warm_up(lambda: self._run_eagerly(batch, seed, loss_scale, is_last))
            return
        self._drop_if_moved()
        self._fill(shape, batch, loss_scale)
        self._work.method.seed(seed)
        if shape in self._graphs or self._try_capture(shape):
            # The ranks exchange its gradients after it: a collective inside a graph would need all ranks to replay it.
            self._graphs[shape].replay()
        else:
            self._run_eagerly(batch, seed, loss_scale, is_last)

    def release(self, cause: str) -> bool:
        """Free all graphs, and use none in future."""
        if not self._choice.enabled:
            return False
        self._turn_off(cause)
        return True

    def make_room(self) -> None:
        """Free all graphs if models that run without them need the memory. They are captured again later."""
        if self._graphs and must_make_room(self._device.free_bytes(), self._device.held_bytes()):
            _LOG.info("CUDA graphs are freed to make room, and captured again later")
            self._drop()

    def _run_eagerly(self, batch: Batch, seed: int, loss_scale: float, is_last: bool) -> None:
        self._work.method.seed(seed)
        if is_last:
            self._work.gradients.expect_last_pass()
        self._work.run(batch, loss_scale)

    def _fill(self, shape: BatchShape, batch: Batch, loss_scale: float) -> None:
        if self._scale is None:
            self._scale = torch.ones((), dtype=torch.float32, device=batch.latents.device)
        self._scale.fill_(loss_scale)
        if shape in self._inputs:
            self._inputs[shape].fill(batch)
        else:
            self._inputs[shape] = StaticBatch(batch)

    def _try_capture(self, shape: BatchShape) -> bool:
        """Capture the pass of a shape. If that fails, free all graphs, and report why.

        Raises:
            ConfigError: the manifest requires graphs.
        """
        static, scale = self._inputs[shape].batch, self._scale
        assert scale is not None
        try:
            self._graphs[shape] = self._device.capture(
                lambda: self._work.run(static, scale), self._work.method.generators()
            )
        except (RuntimeError, MemoryError) as error:
            cause = describe_failure(error)
            if self._choice.requested is SwitchMode.ON:
                raise ConfigError(
                    f"training.cudaGraphs: on is not possible because {cause}; write auto, or a smaller batchSize"
                ) from error
            self._turn_off(cause)
            return False
        self._addresses = self._current_addresses()
        _LOG.info("captured a pass with latents of %s as CUDA graph %d", shape, len(self._graphs))
        if self._schedule.is_full:
            _LOG.info("further shapes run without a CUDA graph")
        return True

    def _turn_off(self, cause: str) -> None:
        self._choice = self._choice.turned_off(cause)
        self._note(self._choice.reason)
        self._drop()
        self._inputs.clear()

    def _drop(self) -> None:
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()
        self._schedule.drop()
        self._device.release()

    def _drop_if_moved(self) -> None:
        """Free all graphs if weights or gradients are no longer where the graphs expect them."""
        if self._graphs and self._addresses != self._current_addresses():
            _LOG.info("weights or gradients have moved; CUDA graphs are captured again")
            self._drop()

    def _current_addresses(self) -> list[int]:
        gradients = [parameter.grad for parameter in self._parameters]
        leaves, signals = self._work.method.leaves(), self._work.gradients.signals
        tensors: Sequence[Tensor | None] = [*self._parameters, *leaves, *gradients, signals]
        return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def describe_failure(error: BaseException) -> str:
    """Return why a capture failed, in one line: the first error, because ending a broken capture raises another one."""
    first = error
    while (earlier := first.__cause__ or first.__context__) is not None:
        first = earlier
    if is_out_of_memory(first):
        return "memory ran out while a pass was captured"
    lines = str(first).strip().splitlines()
    return f"a pass cannot be captured: {(lines[0] if lines else type(first).__name__)[:_MAX_CAUSE]}"


def reset_quietly(graph: Graph) -> None:
    """Free a graph whose capture may have failed."""
    with contextlib.suppress(RuntimeError):
        graph.reset()
