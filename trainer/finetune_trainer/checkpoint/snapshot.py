"""What goes into a checkpoint, and what is known of one that was committed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_contract.manifest import Manifest
from finetune_trainer.checkpoint.split import Groups

STATE = "state.json"
BEST = "best_validation"
"""Key of a snapshot's values: {"step", "loss"} of the best validation so far; its checkpoint may stay for that."""


@dataclass(frozen=True)
class Snapshot:
    """The state of a run after a step.

    Attributes:
        step: finished optimizer steps.
        tensors: groups of named tensors, e.g. "model" and "optimizer".
        values: everything else, as JSON.
        offsets: where a tensor begins in the whole one, for those that are shards, by name.
    """

    step: int
    tensors: Groups
    values: Mapping[str, Any]
    offsets: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Committed:
    """A checkpoint that was verified.

    Attributes:
        folder: where its files are; of one in an object store, where they are once it was chosen.
    """

    folder: Path
    manifest: Manifest

    @property
    def size_bytes(self) -> int:
        """Size of its files."""
        return sum(entry.size_bytes for entry in self.manifest.files)
