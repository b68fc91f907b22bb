"""Ways in which a rank ends early, each with the exit code that tells the operator what to do about it.

Raised anywhere in the trainer with one sentence for a person; `rank.main` alone turns them into an exit.
"""

from __future__ import annotations

from typing import ClassVar

from finetune_contract.exit_codes import ExitCode


class RankError(Exception):
    """Base of the expected ends. Its text is one sentence that a person can act on."""

    code: ClassVar[ExitCode] = ExitCode.SOFTWARE


class ConfigError(RankError):
    """The run specification cannot be run; the sentence names the field and what to write instead."""

    code = ExitCode.CONFIG


class DataError(RankError):
    """The data set cannot be used as asked; the sentence names the field and what is there."""

    code = ExitCode.DATA


class StorageError(RankError):
    """Checkpoints, caches or outputs can no longer be written or read."""

    code = ExitCode.STORAGE


class StaleError(RankError):
    """No checkpoint could be written for longer than is allowed: going on would lose more."""

    code = ExitCode.STALE


class FabricError(RankError):
    """A peer or the connection to it was lost in a collective."""

    code = ExitCode.FABRIC


class SupersededError(RankError):
    """A newer attempt owns the checkpoints: this one must write nothing more."""

    code = ExitCode.SUPERSEDED
