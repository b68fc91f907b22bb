"""Atomic and durable writes: a kill or a power failure leaves the old file or the new one, never a part."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Write a temporary file, make it durable, and rename it to its path. Create missing parent folders.

    Raises:
        OSError: the file cannot be written; no temporary file remains.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.writing")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def use_default_mode(files: Iterable[Path], folder: Path) -> None:
    """Give files the permissions of a new file in `folder`, which follow from the umask and the folder.

    The safetensors library makes its files readable by their owner only, but other pods may run as other users.

    Raises:
        OSError: the permissions cannot be read or changed.
    """
    probe = folder / f".{secrets.token_hex(8)}.writing"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in files:
        file.chmod(mode)


def sync_file(path: Path) -> None:
    """Make a file's content durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make a folder's entries durable, for example after a rename."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
