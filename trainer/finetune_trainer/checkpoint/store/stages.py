"""The stages of a save, in their order, as the hook between them is told: tests and benches kill ranks there."""

from __future__ import annotations

from enum import StrEnum


class SaveStage(StrEnum):
    """What comes next. A hook may be told of it with more words, such as the folder that is removed."""

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
"""Stages that ranks other than 0 may come to, each in its part."""


def write_stage(group: str) -> str:
    """The stage in which a group of tensors is written."""
    return f"write {group}"
