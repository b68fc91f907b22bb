"""JSON files that are written atomically. All state of the local cluster uses them. Blocking: call in a thread."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Warn = Callable[[str], None]
"""Receives a warning message for the user."""


class BrokenFileError(Exception):
    """A file exists but its content is invalid. The message contains the path and the cause."""


def write_json(path: Path, value: Any, *, keep_previous: bool = False) -> None:
    """Write to a temporary file, fsync, rename, fsync the folder: a reader gets the complete old or new file.

    Args:
        path: the file.
        value: a value that json can write.
        keep_previous: keep the previous version as `<name>.previous`, for `read_or_recover`.

    Raises:
        OSError: the disk is full, or the file is not writable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Only the holder of the job's lock writes, so a fixed name is safe. A leftover of a killed writer is overwritten.
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    if keep_previous:
        _keep_previous(path)
    temporary.replace(path)
    sync_folder(path.parent)


def read_json(path: Path, parse: Callable[[Any], T]) -> T | None:
    """Return the parsed content of a file; None if it does not exist. Changes nothing on disk.

    Raises:
        BrokenFileError: the content is not JSON, or `parse` raised ValueError, TypeError or KeyError.
        OSError: the file cannot be read.
    """
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except IsADirectoryError as error:
        raise BrokenFileError(f"{path} is a folder, not a file") from error
    try:
        return parse(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = "is empty" if not text.strip() else f"cannot be read ({str(error).splitlines()[0]})"
        raise BrokenFileError(f"{path} {reason}") from error


def read_or_recover(path: Path, parse: Callable[[Any], T], warn: Warn) -> T | None:
    """Read a file as its owner: rename a broken file with a warning, and use the previous version."""
    previous = path.with_name(path.name + ".previous")
    for candidate, source in ((path, ""), (previous, "using the previous version")):
        try:
            found = read_json(candidate, parse)
        except BrokenFileError as error:
            warn(f"{error}: renamed to {rename_broken(candidate).name}")
            continue
        if found is not None:
            if source:
                warn(f"{path} is missing: {source}")
            return found
    return None


def rename_broken(path: Path) -> Path:
    """Rename a broken file to a free name `<name>.broken-<number>` and return the new path."""
    number = 1
    while (target := path.with_name(f"{path.name}.broken-{number}")).exists():
        number += 1
    path.rename(target)
    return target


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _keep_previous(path: Path) -> None:
    """Hard-link the current file to `<name>.previous`, so that a complete file exists at every moment."""
    link = path.with_name(f".{path.name}.link")
    link.unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        os.link(path, link)
        link.replace(path.with_name(path.name + ".previous"))
