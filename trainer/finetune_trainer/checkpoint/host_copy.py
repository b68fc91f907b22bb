"""Copies of tensors in the host's memory, into buffers that are kept from save to save.

Made by the writer's thread while the loop runs the next forward and backward pass: the state changes only in the
optimizer's step, so the copy has to be finished only before that one (CheckFreq, FAST 2021).
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from finetune_trainer.checkpoint.split import Groups, size_bytes

SMALL_NUMEL = 32 * 1024
"""Torch copies a tensor of fewer elements in the thread that asks for it."""


class HostCopy:
    """The buffers of one rank: as much host memory as it writes of the state."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._stream = torch.Stream(device) if device.type == "cuda" else None
        self._ready: torch.Event | None = None

    def mark(self) -> None:
        """Say from the loop's thread that the state has changed: on a GPU, behind what is queued now."""
        if self._stream is not None:
            self._ready = torch.Event(self._device)
            self._ready.record()

    def copy(self, groups: Groups) -> dict[str, dict[str, Tensor]]:
        """Copy tensors; blocks until all are there. Called from the writer's thread."""
        wanted = {(group, name): tensor for group, tensors in groups.items() for name, tensor in tensors.items()}
        with self._behind_the_last_change():
            self._copy_all(wanted)
        return {group: {name: self._buffers[group, name] for name in tensors} for group, tensors in groups.items()}

    def take_out(self, groups: Groups) -> Groups:
        """The tensors in the host's memory, where the loop goes on no more: no buffers, no copy of what is there."""
        with self._behind_the_last_change():
            return {
                group: {name: tensor.detach().cpu() for name, tensor in tensors.items()}
                for group, tensors in groups.items()
            }

    @contextlib.contextmanager
    def _behind_the_last_change(self) -> Iterator[None]:
        """On a GPU a stream of its own, for the loop's may hang in a collective that never ends."""
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
            # One call for all of them: each would give the interpreter away, and wait for it again.
            torch._foreach_copy_([target for _, target in small], [source for source, _ in small])

    def _buffer(self, key: tuple[str, str], like: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != like.shape or buffer.dtype != like.dtype:
            buffer = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
            self._buffers[key] = buffer
        return buffer


def _copy(source: Tensor, target: Tensor) -> None:
    if source.device.type == "cpu" and source.is_contiguous():
        # Not torch's own copy: it would start a second team of threads on the cores that train.
        ctypes.memmove(target.data_ptr(), source.data_ptr(), size_bytes(source))
    else:
        target.copy_(source, non_blocking=True)
