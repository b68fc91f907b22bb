"""Loads a denoiser by mapping its files into memory and copying each tensor once, to the device.

The module is built without weights. Tensors go to the device one by one and change their number format there, so there
is no second copy in host memory, and at most one tensor more than the module on the device. Nothing here changes global
state of torch, so it may run in a thread, while the data is being opened: see `EarlyDenoiser`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

Proceed = Callable[[], bool]
"""Returns whether the module is still needed."""


@runtime_checkable
class DirectFamily(Protocol):
    """A family whose denoiser can be loaded in this way."""

    before_encoders: Callable[[], None]
    """Called before an encoder is loaded, to free memory."""

    def read_denoiser(self, dtype: torch.dtype, device: torch.device, proceed: Proceed) -> Any | None:
        """Return the denoiser in `dtype` on the device; None if `load_denoiser` must load it or it is not needed."""
        ...


def read_module(
    make: Callable[[], Any], files: Sequence[Path], dtype: torch.dtype, device: torch.device, proceed: Proceed
) -> Any | None:
    """Return a module with the weights of safetensors files.

    Args:
        make: builds the module; called in a context in which its weights take no memory.
        files: the files with exactly the module's tensors.
        dtype: number format of the weights.
        device: device of the weights.
        proceed: asked before each tensor.

    Returns:
        The module in evaluation mode. None if the files hold other tensors or cannot be read, or if it is not needed.
    """
    with torch.device("meta"):
        module = make()
    expected = {name: value.shape for name, value in module.state_dict().items()}
    tensors: dict[str, Tensor] = {}
    try:
        for path in files:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  it is not a mapping
                    if not proceed() or tuple(file.get_slice(name).get_shape()) != tuple(expected.get(name, (-1,))):
                        return None
                    tensors[name] = _place(file.get_tensor(name), dtype, device)
    except (OSError, SafetensorError):
        return None
    if tensors.keys() != expected.keys():
        return None
    module.load_state_dict(tensors, assign=True)
    is_complete = not any(value.is_meta for value in [*module.parameters(), *module.buffers()])
    return module.eval() if is_complete else None


def _place(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    # In one call, torch would change the number format on the CPU.
    moved = tensor.to(device)
    return moved.to(dtype) if moved.is_floating_point() else moved


class EarlyDenoiser:
    """Loads a denoiser, in the background if `start` is called, otherwise when it is taken."""

    def __init__(self, family: object, dtype: torch.dtype, device: torch.device) -> None:
        self._family = family
        self._dtype = dtype
        self._device = device
        self._thread: threading.Thread | None = None
        self._is_dropped = threading.Event()
        self._module: Any | None = None

    def start(self) -> None:
        """Start to load it. It is dropped if the family loads an encoder before it is taken."""
        if isinstance(self._family, DirectFamily):
            self._family.before_encoders = self.drop
        self._thread = threading.Thread(target=self._read, name="denoiser", daemon=True)
        self._thread.start()

    def drop(self) -> None:
        """Free it, because something else needs the memory first."""
        if self._thread is not None:
            self._is_dropped.set()
            self._thread.join()
            self._thread, self._module = None, None
            self._is_dropped.clear()

    def take(self) -> Any | None:
        """Return the denoiser, once; None if `load_denoiser` must load it."""
        if self._thread is None:
            self._read()
        else:
            self._thread.join()
            self._thread = None
        module, self._module = self._module, None
        return module

    def _read(self) -> None:
        if isinstance(self._family, DirectFamily):
            self._module = self._family.read_denoiser(self._dtype, self._device, lambda: not self._is_dropped.is_set())
