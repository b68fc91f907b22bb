"""JSON files that are whole or not there. All state of the local cluster goes through here. Blocking: use a thread."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Warn = Callable[[str], None]
"""Takes a sentence for a person."""


class BrokenFileError(Exception):
    """A file is there but does not hold what it should; the message says which and why."""


def write_json(path: Path, value: Any, *, keep_previous: bool = False) -> None:
    """Write aside, fsync, rename, fsync the folder: a reader sees the old file or the new one, whole.

    Args:
        path: the file.
        value: what json can write.
        keep_previous: keep the version before as `<name>.previous`, for `recover`.

    Raises:
        OSError: disk full, not writable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # One writer holds the job's lock, so a fixed name will do, and what a dead one left is overwritten.
    aside = path.with_name(f".{path.name}.new")
    with aside.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    if keep_previous:
        _keep_previous(path)
    aside.replace(path)
    sync_folder(path.parent)


def read_json(path: Path, parse: Callable[[Any], T]) -> T | None:
    """Read a file; None where there is none. Changes nothing on disk.

    Raises:
        BrokenFileError: it is no JSON, or `parse` raised ValueError, TypeError or KeyError.
        OSError: it cannot be read.
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


def recover(path: Path, parse: Callable[[Any], T], warn: Warn) -> T | None:
    """Read a file for its owner: a broken one is set aside with a warning and the version before is taken."""
    previous = path.with_name(path.name + ".previous")
    for candidate, source in ((path, ""), (previous, "the version before it is used")):
        try:
            found = read_json(candidate, parse)
        except BrokenFileError as error:
            warn(f"{error}: set aside as {set_aside(candidate).name}")
            continue
        if found is not None:
            if source:
                warn(f"{path} is missing: {source}")
            return found
    return None


def set_aside(path: Path) -> Path:
    """Rename a broken file out of the way, under a name that is free, and return that."""
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
    """Give the present file a second name, so that at no moment there is none."""
    link = path.with_name(f".{path.name}.link")
    link.unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        os.link(path, link)
        link.replace(path.with_name(path.name + ".previous"))
