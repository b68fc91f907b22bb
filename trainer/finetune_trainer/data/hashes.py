"""SHA-256 hashes of files and texts. Hashes of files are computed once, and kept in a note."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from finetune_trainer import patience
from finetune_trainer.files import write_atomically

FileState = tuple[int, int, int]
"""Size, mtime and ctime of a file. An edit can keep the first two; only the kernel sets the ctime, at every change."""


class FileHashes:
    """Hashes of files that rarely change (weights, images).

    Args:
        note: the file that keeps them between runs.
    """

    def __init__(self, note: Path) -> None:
        self._note = note
        self._known: dict[str, tuple[FileState, str]] = _read(note)
        self._changed = False
        self._folders: dict[Path, str] = {}

    def of_file(self, path: Path) -> str:
        """Return the SHA-256 of a file, in hex.

        Raises:
            OSError: it cannot be read.
        """
        return self.of_file_with_state(path)[0]

    def of_file_with_state(self, path: Path) -> tuple[str, FileState]:
        """Return the SHA-256 of a file, in hex, and the state that the file had before it was read.

        Raises:
            OSError: it cannot be read.
        """
        name = self._resolve(path)
        stat = path.stat()
        state = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        known = self._known.get(name)
        if known is not None and known[0] == state:
            return known[1], state
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._known[name] = (state, digest)
        self._changed = True
        return digest, state

    def _resolve(self, path: Path) -> str:
        """Return the path without symbolic links. Images share few folders, which are resolved once."""
        if path.is_symlink():
            return str(path.resolve())
        folder = path.parent
        if folder not in self._folders:
            self._folders[folder] = str(folder.resolve())
        return os.path.join(self._folders[folder], path.name)  # noqa: PTH118  called for each image of a data set

    def of_files(self, paths: Iterable[Path]) -> str:
        """Return one hash of the names and contents of several files, in the given order."""
        return hash_text(*(part for path in paths for part in (path.name, self.of_file(path))))

    def save(self) -> None:
        """Write the note. If two processes write at the same time, only new hashes of one of them are lost."""
        if self._changed:
            note = json.dumps({name: (*state, sha) for name, (state, sha) in self._known.items()}).encode()
            patience.wait_out("cache: writing hashes", lambda: write_atomically(self._note, note))
            self._changed = False


def hash_text(*parts: str) -> str:
    """Return the SHA-256 of several texts, in hex. Each is hashed with its length, so lists do not collide."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def noted_number(note: Path, compute: Callable[[], int]) -> int:
    """Return a number that a file keeps between runs. Compute it if there is no such file, or if it is damaged."""
    try:
        return int(note.read_text(encoding="ascii"))
    except (OSError, ValueError):
        number = compute()
    # A note that cannot be written only costs the time to compute the number again.
    with contextlib.suppress(OSError):
        write_atomically(note, str(number).encode())
    return number


def _read(note: Path) -> dict[str, tuple[FileState, str]]:
    try:
        return {
            name: ((int(size), int(mtime), int(ctime)), str(sha))
            for name, (size, mtime, ctime, sha) in json.loads(note.read_bytes()).items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        # A damaged note, or one of an earlier release, only costs the time to compute the hashes again.
        return {}
