"""Loss scale for fp16 (https://arxiv.org/abs/1710.03740, section 3.2), saved with the state of the run.

fp16 gradients underflow below 6e-8: the loss is multiplied before the backward pass, and the sum of the gradients is
divided after it. If the gradients overflow, the step changes no weights and the scale is halved. After many finite
steps the scale is doubled. All scales are powers of two, so scaling adds no rounding errors. Every rank has the same
sums, so all ranks compute the same scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_trainer.errors import ConfigError

FIRST_SCALE = 65536.0
STEPS_TO_DOUBLE = 2000


class LossScale:
    """The scale, and the number of steps without overflow."""

    def __init__(self) -> None:
        self.value = FIRST_SCALE
        self._good_steps = 0

    def record_finite(self) -> None:
        """Record a step with finite gradients."""
        self._good_steps += 1
        if self._good_steps == STEPS_TO_DOUBLE:
            self.value *= 2
            self._good_steps = 0

    def record_overflow(self) -> None:
        """Record a step whose gradients overflowed.

        Raises:
            ConfigError: the scale cannot be reduced further.
        """
        if self.value <= 1:
            raise ConfigError(
                "training.precision: the gradients overflow fp16 in every step; write bf16, or fp32, or a lower "
                "learningRate"
            )
        self.value /= 2
        self._good_steps = 0

    def values(self) -> dict[str, Any]:
        """Return the values that a checkpoint holds."""
        return {"value": self.value, "goodSteps": self._good_steps}

    def restore(self, values: Mapping[str, Any]) -> None:
        """Restore the values from a checkpoint."""
        self.value, self._good_steps = float(values["value"]), int(values["goodSteps"])
