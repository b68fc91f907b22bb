"""The contents of a checkpoint, and a committed checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_contract.manifest import Manifest
from finetune_trainer.checkpoint.split import Groups

STATE = "state.json"
BEST = "best_validation"
"""Key of a snapshot's values: {"step", "loss"} of the best validation so far; retention may keep its checkpoint."""


@dataclass(frozen=True)
class Snapshot:
    """The state of a run after a step.

    Attributes:
        step: number of finished optimizer steps.
        tensors: groups of named tensors, e.g. "model" and "optimizer".
        values: all other values, as JSON.
        offsets: start of each shard in its complete tensor, by name; empty if the tensors are not shards.
    """

    step: int
    tensors: Groups
    values: Mapping[str, Any]
    offsets: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Committed:
    """A committed and verified checkpoint.

    Attributes:
        folder: folder of its files; for an object store, the local folder that they are fetched to.
        manifest: its manifest.
    """

    folder: Path
    manifest: Manifest

    @property
    def size_bytes(self) -> int:
        """Return the size of its files."""
        return sum(entry.size_bytes for entry in self.manifest.files)
