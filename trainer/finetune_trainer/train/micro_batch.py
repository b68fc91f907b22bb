"""How many samples go through the model at once: fewer where memory runs out, the global batch being the same.

Gradients are summed over a step's samples whatever the micro-batch, and every draw is keyed by its sample, so a step
that ran out of memory is simply begun again with half of it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from finetune_trainer.errors import ConfigError

_ON_CPU = ("can't allocate memory", "could not create a memory object", "bad allocation", "std::bad_alloc")
"""What torch and its libraries say where a CPU's memory runs out; they raise RuntimeError for it as for all else."""


class MicroBatch:
    """The size of a rank's micro-batches.

    Args:
        size: what was asked for, or chosen.
        warn: told when it is halved.
    """

    def __init__(self, size: int, warn: Callable[[str], None]) -> None:
        self.size = size
        self._warn = warn

    def halve(self, share: int) -> None:
        """Memory ran out with this size: go on with half of what a pass really held.

        Args:
            share: samples of this rank's step, for no pass holds more.

        Raises:
            ConfigError: it was one sample.
        """
        held = min(self.size, share)
        if held <= 1:
            raise ConfigError(
                "training.batchSize: memory runs out with one sample at a time; write gradientCheckpointing: true, "
                "optimizer: adafactor or a smaller resolution, or ask for more memory"
            )
        self.size = held // 2
        self._warn(f"memory ran out with {held} samples at a time; goes on with {self.size}, and the same global batch")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def too_large(self, share: int) -> ConfigError:
        """What to say where memory ran out and nothing can be begun again; `share` as above."""
        held = min(self.size, share)
        return ConfigError(
            f"training.batchSize: memory runs out with {held} samples at a time, and with sharding a step cannot be "
            "begun again; write a smaller one, gradientCheckpointing: true or offload: cpu, or ask for more memory"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or on a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _ON_CPU)
