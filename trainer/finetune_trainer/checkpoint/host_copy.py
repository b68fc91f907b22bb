"""Copies tensors to host memory, into buffers that are reused for every save.

The writer's thread makes the copy while the loop runs the next forward and backward pass. The state changes only in the
optimizer's step, so the copy must be complete only before that step (CheckFreq, FAST 2021).
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from finetune_trainer.checkpoint.split import Groups, size_bytes

SMALL_NUMEL = 32 * 1024
"""torch copies a tensor with fewer elements in the calling thread."""


class HostCopy:
    """The buffers of one rank: as much host memory as the part of the state that it writes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._stream = torch.Stream(device) if device.type == "cuda" else None
        self._ready: torch.Event | None = None

    def mark_changed(self) -> None:
        """Record that the state has changed; on a GPU, when the work queued so far is done. The loop calls it."""
        if self._stream is not None:
            self._ready = torch.Event(self._device)
            self._ready.record()

    def copy(self, groups: Groups) -> dict[str, dict[str, Tensor]]:
        """Copy tensors, and block until all are complete. The writer's thread calls it."""
        wanted = {(group, name): tensor for group, tensors in groups.items() for name, tensor in tensors.items()}
        with self._after_last_change():
            self._copy_all(wanted)
        return {group: {name: self._buffers[group, name] for name in tensors} for group, tensors in groups.items()}

    def copy_to_host(self, groups: Groups) -> Groups:
        """Return the tensors in host memory, for a loop that has ended: no buffers, and CPU tensors are not copied."""
        with self._after_last_change():
            return {
                group: {name: tensor.detach().cpu() for name, tensor in tensors.items()}
                for group, tensors in groups.items()
            }

    @contextlib.contextmanager
    def _after_last_change(self) -> Iterator[None]:
        """Run the block after the last change of the state.

        On a GPU it runs on a separate stream, because the loop's stream may hang in a collective.
        """
        if self._stream is None:
            yield
            return
        assert self._ready is not None
        with self._stream:
            self._stream.wait_event(self._ready)
            yield
        self._stream.synchronize()

    def _copy_all(self, wanted: Mapping[tuple[str, str], Tensor]) -> None:
        for key in self._buffers.keys() - wanted.keys():
            del self._buffers[key]
        small: list[tuple[Tensor, Tensor]] = []
        for key, tensor in wanted.items():
            source, target = tensor.detach(), self._buffer(key, tensor)
            if source.is_cpu and source.numel() < SMALL_NUMEL:
                small.append((source, target))
            else:
                _copy(source, target)
        if small:
            # One call for all: each separate call would release the interpreter lock and wait for it again.
            torch._foreach_copy_([target for _, target in small], [source for source, _ in small])

    def _buffer(self, key: tuple[str, str], like: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != like.shape or buffer.dtype != like.dtype:
            buffer = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
            self._buffers[key] = buffer
        return buffer


def _copy(source: Tensor, target: Tensor) -> None:
    if source.device.type == "cpu" and source.is_contiguous():
        # Not torch's copy: it would start a second thread pool on the cores that train.
        ctypes.memmove(target.data_ptr(), source.data_ptr(), size_bytes(source))
    else:
        target.copy_(source, non_blocking=True)
