"""Size of the micro-batch: halved when memory runs out, with the same global batch.

Gradients are summed over all samples of a step for any micro-batch size, and every random draw is keyed by its sample.
So a step that ran out of memory is repeated with half the micro-batch, and gives the same result.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from finetune_trainer.errors import ConfigError

_ON_CPU = ("can't allocate memory", "could not create a memory object", "bad allocation", "std::bad_alloc")
"""Messages of torch and its libraries when a CPU's memory runs out; the exception type is a plain RuntimeError."""


class MicroBatch:
    """The size of a rank's micro-batches.

    Args:
        size: the requested or chosen size.
        warn: receives a message when the size is halved.
    """

    def __init__(self, size: int, warn: Callable[[str], None]) -> None:
        self.size = size
        self._warn = warn

    def halve(self, share: int) -> None:
        """Halve the size after memory ran out, starting from the number of samples that a pass really held.

        Args:
            share: number of samples of this rank in a step; no pass holds more.

        Raises:
            ConfigError: a pass already held only one sample.
        """
        held = min(self.size, share)
        if held <= 1:
            raise ConfigError(
                "training.batchSize: memory runs out with one sample at a time; write gradientCheckpointing: true, "
                "optimizer: adafactor or a smaller resolution, or request more memory"
            )
        self.size = held // 2
        self._warn(
            f"memory ran out with {held} samples at a time; continuing with {self.size} and the same global batch"
        )
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def too_large_error(self, share: int) -> ConfigError:
        """Return the error for memory that ran out in a step that cannot be repeated; `share` as in `halve`."""
        held = min(self.size, share)
        return ConfigError(
            f"training.batchSize: memory runs out with {held} samples at a time, and a sharded step cannot be "
            "repeated; write a smaller batchSize, gradientCheckpointing: true or offload: cpu, or request more memory"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception means that memory ran out, on a GPU or on a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _ON_CPU)
