"""CUDA graphs, as thin as possible: `graphed` decides when to capture and replay."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from finetune_trainer.train.passes.graphed import Graph, reset_quietly


class CudaGraphs:
    """Captures on a stream of its own, with one memory pool for all graphs; see `GraphDevice`.

    No two graphs run at the same time, and no result of a graph stays in the pool, so that all graphs can use the same
    memory. Autograd remembers the stream on which a parameter is first used: therefore passes that may be captured
    later run on the stream of the captures from the start.

    Args:
        device: the rank's GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._held_bytes = 0

    def warm_up(self, run: Callable[[], None]) -> None:
        """Run a computation on the stream of the captures, between those of the current stream."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()
        current.wait_stream(self._stream)

    def capture(self, run: Callable[[], None], generators: Sequence[torch.Generator]) -> Graph:
        """Capture a computation; see `GraphDevice`.

        Raises:
            RuntimeError: it cannot be captured.
        """
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        # The other threads of a rank copy batches and checkpoints, which must not break the capture.
        recording = torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local")
        before = 0
        try:
            with recording:
                before = torch.cuda.memory_reserved(self._device)
                run()
        except BaseException:
            self._recover(graph, generators)
            raise
        self._held_bytes += max(0, torch.cuda.memory_reserved(self._device) - before)
        captured: Graph = graph
        return captured

    def free_bytes(self) -> int:
        """Return the memory that is free, or reserved by torch outside of the pool of the graphs."""
        free, _ = torch.cuda.mem_get_info(self._device)
        cached = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return free + max(0, cached - self._held_bytes)

    def held_bytes(self) -> int:
        """Return the size of the pool of the graphs."""
        return self._held_bytes

    def release(self) -> None:
        """Return the memory of graphs that were reset to the device."""
        torch.cuda.synchronize(self._device)
        self._held_bytes = 0
        self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()

    def _recover(self, graph: Any, generators: Sequence[torch.Generator]) -> None:
        """Undo what a failed capture leaves in torch's allocator and random generators."""
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
        reset_quietly(graph)
        for generator in (torch.cuda.default_generators[torch.cuda.current_device()], *generators):
            with contextlib.suppress(RuntimeError):
                # A generator whose capture did not end refuses to draw. A new state is seeded before the next pass.
                generator.graphsafe_set_state(torch.Generator(device=self._device))
