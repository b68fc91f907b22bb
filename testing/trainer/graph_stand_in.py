"""Stand-in for CUDA graphs on a CPU: records the operations of a pass and runs exactly these again.

As on a GPU, a capture changes nothing, and a replay runs no Python of the captured code: each operation reads and
writes the tensors that it had in the capture. An input that is not static, a weight that has moved or a gradient that
was replaced therefore gives wrong results here, too. Reading a value on the host, and creating a tensor from Python
values, fail as they do on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ILLEGAL = {
    "_local_scalar_dense": "operation not permitted when stream is capturing: it reads a value on the host",
    "nonzero": "operation not permitted when stream is capturing: the size of the result depends on values",
    "lift_fresh": "operation not permitted when stream is capturing: it copies values of Python to the device",
}


@dataclass
class TapeGraph:
    """The operations of a captured pass."""

    operations: list[tuple[Any, tuple[Any, ...], Mapping[str, Any], list[Tensor]]] = field(default_factory=list)
    num_replays: int = 0

    def replay(self) -> None:
        """Run all operations with the current values of their tensors."""
        self.num_replays += 1
        with torch.no_grad():
            for function, args, kwargs, outputs in self.operations:
                results = tree_leaves(function(*args, **kwargs))
                for output, result in zip(outputs, (each for each in results if isinstance(each, Tensor)), strict=True):
                    if output.data_ptr() != result.data_ptr():
                        output.copy_(result)

    def reset(self) -> None:
        """Free the tensors."""
        self.operations.clear()


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records operations, and saves what they overwrite outside of the capture."""

    def __init__(self, graph: TapeGraph) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._graph = graph
        self._own: set[int] = set()
        self._kept: list[Tensor] = []
        self._saved: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Record one operation."""
        kwargs = kwargs or {}
        if problem := _ILLEGAL.get(func.overloadpacket.__name__):
            raise RuntimeError(f"{problem} ({func})")
        self._save_targets(func, args, kwargs)
        result = func(*args, **kwargs)
        outputs = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        if not func.is_view:
            self._graph.operations.append((func, args, kwargs, outputs))
            self._own.update(each.untyped_storage().data_ptr() for each in outputs)
            self._kept += outputs
        return result

    def restore(self) -> None:
        """Undo the changes of tensors that existed before the capture."""
        for tensor, values in self._saved.values():
            tensor.copy_(values)

    def _save_targets(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        for number, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            for tensor in tree_leaves(value):
                storage = tensor.untyped_storage().data_ptr()
                if storage not in self._own and storage not in self._saved:
                    # The view that is written may be a part of a larger tensor: save all of it.
                    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
                    self._saved[storage] = (whole, whole.clone())


class TapeDevice:
    """Captures on a CPU; see `GraphDevice` of `train.passes.graphed`.

    Args:
        fail: called at the start of each capture; may raise what a GPU would.
        free: free memory that it reports.
    """

    def __init__(self, fail: Callable[[], None] = lambda: None, free: int = 2**40) -> None:
        self.fail, self.free = fail, free
        self.graphs: list[TapeGraph] = []
        self.num_warm_ups = 0
        self.num_releases = 0

    def warm_up(self, run: Callable[[], None]) -> None:
        """Run a computation."""
        self.num_warm_ups += 1
        run()

    def capture(self, run: Callable[[], None], generators: Sequence[torch.Generator] = ()) -> TapeGraph:
        """Record a computation, and undo what it has changed."""
        graph = TapeGraph()
        recorder = _Recorder(graph)
        state = torch.get_rng_state()
        states = [generator.get_state() for generator in generators]
        try:
            with recorder:
                self.fail()
                run()
        finally:
            with torch.no_grad():
                recorder.restore()
            torch.set_rng_state(state)
            for generator, own in zip(generators, states, strict=True):
                generator.set_state(own)
        self.graphs.append(graph)
        return graph

    def free_bytes(self) -> int:
        """Return the free memory."""
        return self.free

    def held_bytes(self) -> int:
        """Return a size for each graph that was not freed."""
        return sum(2**30 for graph in self.graphs if graph.operations)

    def release(self) -> None:
        """Count the call."""
        self.num_releases += 1

    @property
    def num_replays(self) -> int:
        """Number of passes that were replayed."""
        return sum(graph.num_replays for graph in self.graphs)
