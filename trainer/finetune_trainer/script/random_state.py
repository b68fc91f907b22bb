"""The random number generators of this process: python, numpy, torch and the current GPU."""

from __future__ import annotations

import pickle
import random
from array import array
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor


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
        version, words, gauss = self.python
        name, keys, *rest = self.numpy
        python = (version, array("Q", words).tobytes(), gauss)
        tensors = tuple(None if each is None else each.numpy().tobytes() for each in (self.torch, self.device))
        return pickle.dumps((python, (name, np.asarray(keys).tobytes(), *rest), tensors), pickle.HIGHEST_PROTOCOL)

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


def capture() -> RandomState:
    """Return the state of all generators. It costs some microseconds, and no draw."""
    device = torch.cuda.get_rng_state() if uses_gpu() else None
    return RandomState(random.getstate(), np.random.get_state(legacy=True), torch.get_rng_state(), device)


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
