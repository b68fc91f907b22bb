"""Expected errors that end a rank, each with the exit code that selects the operator's reaction.

Any module of the trainer can raise them, with a one-line message for the user. Only `rank.main` turns them into an
exit.
"""

from __future__ import annotations

from typing import ClassVar

from finetune_contract.exit_codes import ExitCode


class RankError(Exception):
    """Base of the expected errors. Its message is one line that a user can act on."""

    code: ClassVar[ExitCode] = ExitCode.SOFTWARE


class ConfigError(RankError):
    """The run specification cannot be run. The message names the field and what to write instead."""

    code = ExitCode.CONFIG


class DataError(RankError):
    """The data set does not match the specification. The message names the field and what the data set contains."""

    code = ExitCode.DATA


class StorageError(RankError):
    """Checkpoints, caches or outputs can no longer be written or read."""

    code = ExitCode.STORAGE


class NetworkError(RankError):
    """A server that the run needs does not answer, or refuses to for now; see `outages`."""

    code = ExitCode.NETWORK


class StorageOutageError(StorageError):
    """A disk is full, or a file system fails, which usually passes; see `outages`."""

    code = ExitCode.STORAGE_OUTAGE


class StaleError(RankError):
    """No checkpoint could be written for longer than allowed: further training would increase the possible loss."""

    code = ExitCode.STALE


class DeviceError(RankError):
    """The device of this rank computes wrong results or does not respond."""

    code = ExitCode.DEVICE


class FabricError(RankError):
    """A peer or the connection to it was lost in a collective."""

    code = ExitCode.FABRIC


class SupersededError(RankError):
    """A newer attempt owns the checkpoints: this one must not write again."""

    code = ExitCode.SUPERSEDED
