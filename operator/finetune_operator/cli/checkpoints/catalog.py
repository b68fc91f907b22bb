"""Finds the checkpoints of a job in a folder. Reads files only, and needs no torch.

A checkpoint is a folder with a manifest that names every file with its size and SHA-256. Listing and verifying need
nothing else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from finetune_contract import paths
from finetune_contract.manifest import BadCheckpointError, Manifest, read_manifest, verify
from finetune_operator.cli.errors import UsageError

_NAME = re.compile(r"step-(\d{8,})-a(\d+)")


@dataclass(frozen=True)
class FoundCheckpoint:
    """A folder with the name of a checkpoint.

    Attributes:
        step: optimizer steps that it contains.
        attempt: attempt that wrote it.
        manifest: its list of files; None if it cannot be read.
        reason: why the trainer marked it as corrupt, or None.
    """

    folder: Path
    step: int
    attempt: int
    manifest: Manifest | None
    reason: str | None

    @property
    def size_bytes(self) -> int | None:
        """Size of its files according to the manifest."""
        return None if self.manifest is None else sum(entry.size_bytes for entry in self.manifest.files)


def find_checkpoints(folder: Path) -> list[FoundCheckpoint]:
    """Return all checkpoints of a folder: the newest first, the corrupt ones last.

    Raises:
        OSError: the folder cannot be read.
    """
    found = []
    for entry in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.match(entry.name.removeprefix(paths.CORRUPT))
        is_corrupt = entry.name.startswith(paths.CORRUPT)
        if match and (is_corrupt or _NAME.fullmatch(entry.name)):
            reason = _read_reason(entry) if is_corrupt else None
            found.append(FoundCheckpoint(entry, int(match[1]), int(match[2]), _read_manifest(entry), reason))
    return sorted(found, key=lambda one: (one.reason is None, one.step, one.attempt), reverse=True)


def has_checkpoints(folder: Path) -> bool:
    """Return whether a folder itself contains checkpoints."""
    return folder.is_dir() and any(_NAME.match(entry.name) for entry in folder.iterdir())


def pick_checkpoint(found: list[FoundCheckpoint], name: str) -> FoundCheckpoint:
    """Return the checkpoint with a name or a step.

    Raises:
        UsageError: none matches.
    """
    for one in found:
        if name in (one.folder.name, str(one.step)):
            return one
    existing = ", ".join(one.folder.name for one in found) or "none"
    raise UsageError(f"no checkpoint {name}; existing checkpoints: {existing}")


def find_damage(one: FoundCheckpoint) -> str | None:
    """Read all files of a checkpoint and return what differs from the manifest; None if it is intact."""
    try:
        verify(one.folder, read_manifest(one.folder).job_uid)
    except BadCheckpointError as error:
        return str(error)
    return None


def _read_reason(folder: Path) -> str:
    try:
        return (folder / paths.CORRUPT_REASON).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return "damaged"


def _read_manifest(folder: Path) -> Manifest | None:
    try:
        return read_manifest(folder)
    except BadCheckpointError:
        return None
