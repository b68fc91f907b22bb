"""SHA-256 of files, each computed once: a note beside the cache remembers them by path, size and time of change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from finetune_trainer.files import write_aside


class FileHashes:
    """Hashes of files that seldom change (weights, images)."""

    def __init__(self, note: Path) -> None:
        self._note = note
        self._known: dict[str, tuple[int, int, str]] = _read(note)
        self._changed = False

    def of_file(self, path: Path) -> str:
        """SHA-256 of a file, in hex.

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
        """One hash of several files: of their names and contents, in the order given."""
        return hash_text(*(part for path in paths for part in (path.name, self.of_file(path))))

    def keep(self) -> None:
        """Write what was newly computed. Two writers at once lose no more than each other's news."""
        if self._changed:
            write_aside(self._note, json.dumps(self._known).encode())
            self._changed = False


def hash_text(*parts: str) -> str:
    """SHA-256 of texts, each with its length, so that no two lists collide."""
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
        # Nothing is lost but the time to hash anew.
        return {}
