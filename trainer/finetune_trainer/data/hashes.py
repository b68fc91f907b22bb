"""SHA-256 hashes of files and texts. Hashes of files are computed once, and kept in a note with size and mtime."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from finetune_trainer.files import write_atomically


class FileHashes:
    """Hashes of files that rarely change (weights, images).

    Args:
        note: the file that keeps them between runs.
    """

    def __init__(self, note: Path) -> None:
        self._note = note
        self._known: dict[str, tuple[int, int, str]] = _read(note)
        self._changed = False

    def of_file(self, path: Path) -> str:
        """Return the SHA-256 of a file, in hex.

        Raises:
            OSError: it cannot be read.
        """
        name = str(path.resolve())
        stat = path.stat()
        known = self._known.get(name)
        if known is not None and known[:2] == (stat.st_size, stat.st_mtime_ns):
            return known[2]
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._known[name] = (stat.st_size, stat.st_mtime_ns, digest)
        self._changed = True
        return digest

    def of_files(self, paths: Iterable[Path]) -> str:
        """Return one hash of the names and contents of several files, in the given order."""
        return hash_text(*(part for path in paths for part in (path.name, self.of_file(path))))

    def save(self) -> None:
        """Write the note. If two processes write at the same time, only new hashes of one of them are lost."""
        if self._changed:
            write_atomically(self._note, json.dumps(self._known).encode())
            self._changed = False


def hash_text(*parts: str) -> str:
    """Return the SHA-256 of several texts, in hex. Each is hashed with its length, so lists do not collide."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def _read(note: Path) -> dict[str, tuple[int, int, str]]:
    try:
        return {
            name: (int(size), int(time), str(sha)) for name, (size, time, sha) in json.loads(note.read_bytes()).items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        # A damaged note only costs the time to compute the hashes again.
        return {}
