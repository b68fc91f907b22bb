"""The scale of the loss in fp16 (https://arxiv.org/abs/1710.03740, section 3.2), kept with the state of the run.

Gradients of fp16 vanish below 6e-8: the loss is multiplied before backward, and the sum of the gradients divided after.
Where they overflow the step moves nothing and the scale is halved; after many good steps it is doubled. All scales are
powers of two, so scaling itself rounds nothing. Every rank sees the same sums, and so comes to the same scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_trainer.errors import ConfigError

FIRST_SCALE = 65536.0
STEPS_TO_DOUBLE = 2000


class LossScale:
    """The scale, and how long it has held."""

    def __init__(self) -> None:
        self.value = FIRST_SCALE
        self._good_steps = 0

    def held(self) -> None:
        """The gradients of a step were finite."""
        self._good_steps += 1
        if self._good_steps == STEPS_TO_DOUBLE:
            self.value *= 2
            self._good_steps = 0

    def overflowed(self) -> None:
        """They were not.

        Raises:
            ConfigError: nothing is left to take away.
        """
        if self.value <= 1:
            raise ConfigError(
                "training.precision: the gradients overflow fp16 in every step; write bf16, or fp32, or a lower "
                "learningRate"
            )
        self.value /= 2
        self._good_steps = 0

    def values(self) -> dict[str, Any]:
        """As a checkpoint holds it."""
        return {"value": self.value, "goodSteps": self._good_steps}

    def restore(self, values: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.value, self._good_steps = float(values["value"]), int(values["goodSteps"])
