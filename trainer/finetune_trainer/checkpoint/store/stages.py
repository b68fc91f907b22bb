"""The stages of a save, in order. A hook receives each stage before it starts; tests and benches kill ranks there."""

from __future__ import annotations

from enum import StrEnum


class SaveStage(StrEnum):
    """The stage that comes next. The text that a hook receives may continue, e.g. with the folder to remove."""

    COPY = "copy"
    WRITE_EMA = "write ema"
    WRITE_MODEL = "write model"
    WRITE_OPTIMIZER = "write optimizer"
    READ_BACK = "read back"
    WRITE_STATE = "write state"
    WRITE_MANIFEST = "write manifest"
    CHECK_FENCE = "check the fence"
    RENAME = "rename"
    CHECK_FENCE_AGAIN = "check the fence again"
    PRUNE = "prune"
    REMOVE = "remove"
    DELETE = "delete"
    DONE = "done"


IN_PARTS = frozenset(
    {SaveStage.COPY, SaveStage.WRITE_EMA, SaveStage.WRITE_MODEL, SaveStage.WRITE_OPTIMIZER, SaveStage.READ_BACK}
)
"""Stages that ranks other than 0 may reach, each for its part."""


def write_stage(group: str) -> str:
    """Return the stage in which a group of tensors is written."""
    return f"write {group}"
