"""The random number generators of this process: python, numpy, torch and the current GPU."""

from __future__ import annotations

import ctypes
import pickle
import random
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor


class LastResult:
    """A function that returns its last result again if it gets the same object: most steps leave a generator alone."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function
        self._last: tuple[Any, Any] = (None, None)

    def __call__(self, state: Any) -> Any:
        """Return the result for a state."""
        if state is not self._last[0]:
            self._last = state, self._function(state)
        return self._last[1]


def _pack_python(state: tuple[Any, ...]) -> tuple[Any, ...]:
    version, words, gauss = state
    return version, array("Q", words).tobytes(), gauss


def _pack_numpy(state: Any) -> tuple[Any, ...]:
    name, keys, *rest = state
    return name, np.asarray(keys).tobytes(), *rest


_packed_python, _packed_numpy = LastResult(_pack_python), LastResult(_pack_numpy)


@dataclass(frozen=True)
class RandomState:
    """State of all generators of one process at one moment."""

    python: tuple[Any, ...]
    numpy: Any
    torch: Tensor
    device: Tensor | None
    """State of the current GPU's generator; None if this process uses no GPU."""

    @cached_property
    def packed(self) -> bytes:
        """The state as bytes. Tensors and tuples of numbers are slow to pickle, and every step does it."""
        tensors = tuple(None if each is None else each.numpy().tobytes() for each in (self.torch, self.device))
        parts = (_packed_python(self.python), _packed_numpy(self.numpy), tensors)
        return pickle.dumps(parts, pickle.HIGHEST_PROTOCOL)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the packed state, which is made once."""
        return unpack, (self.packed,)


def unpack(packed: bytes) -> RandomState:
    """Return the state from its bytes."""
    (version, words, gauss), (name, keys, *rest), tensors = pickle.loads(packed)  # noqa: S301  from a rank of this job
    first, device = (None if each is None else bytes_to_tensor(each) for each in tensors)
    assert first is not None
    python = (version, tuple(array("Q", words)), gauss)
    return RandomState(python, (name, np.frombuffer(keys, dtype=np.uint32).copy(), *rest), first, device)


def bytes_to_tensor(data: bytes) -> Tensor:
    """Return the state of a generator of torch from its bytes."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def uses_gpu() -> bool:
    """Return whether this process has a context on a GPU."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


class NumpyState:
    """Reads the state of numpy's global generator, and copies it only if it has changed: the copy takes 40 us."""

    def __init__(self) -> None:
        self._generator: Any = None
        self._address = 0
        self._words = b""
        self._state: Any = None

    def read(self) -> Any:
        """Return the state as `np.random.get_state` does."""
        generator = getattr(np.random.mtrand._rand, "_bit_generator", None)
        if type(generator) is not np.random.MT19937:
            return np.random.get_state(legacy=True)
        if generator is not self._generator:
            self._generator, self._address, self._state = generator, generator.ctypes.state_address, None
        words = ctypes.string_at(self._address, MT19937_BYTES)
        # A draw uses up words, unless it takes the second number of a pair of normal draws, which the state holds.
        if self._state is None or self._state[3] or words != self._words:
            self._state, self._words = np.random.get_state(legacy=True), words
        return self._state


class PythonState:
    """Reads the state of Python's generator, and returns the same object if it has not changed."""

    def __init__(self) -> None:
        self._state: tuple[Any, ...] = ()

    def read(self) -> tuple[Any, ...]:
        """Return the state as `random.getstate` does."""
        state = random.getstate()
        if state != self._state:
            self._state = state
        return self._state


MT19937_BYTES = 625 * 4
"""The words of the generator, and the position in them."""
_python_state, _numpy_state = PythonState(), NumpyState()


def capture() -> RandomState:
    """Return the state of all generators. It costs some microseconds, and no draw."""
    device = torch.cuda.get_rng_state() if uses_gpu() else None
    return RandomState(_python_state.read(), _numpy_state.read(), torch.get_rng_state(), device)


def restore(state: RandomState) -> None:
    """Set the state of all generators."""
    random.setstate(state.python)
    np.random.set_state(state.numpy)
    torch.set_rng_state(state.torch)
    if state.device is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state.device)


def in_accelerate_format(state: RandomState, step: int) -> dict[str, Any]:
    """Return the contents of accelerate's file rng_state_N.pkl, which the script alone can read.

    Args:
        state: of one rank.
        step: accelerate's own counter of batches.
    """
    states = {
        "step": step,
        "random_state": state.python,
        "numpy_random_seed": state.numpy,
        "torch_manual_seed": state.torch,
    }
    if state.device is not None:
        # accelerate sets the generators of all devices that the process sees; it draws from one of them only.
        states["torch_cuda_manual_seed"] = [state.device] * torch.cuda.device_count()
    return states
