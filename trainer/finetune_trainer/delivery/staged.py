"""A written output before it is delivered: complete files in a folder of this machine, and their identity."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from finetune_contract.heartbeat import Wire

_BLOCK = 1 << 24


class OutputFile(Wire):
    """One file of an output."""

    name: str
    """Path relative to the output's folder, with '/'."""
    size_bytes: int
    sha256: str
    git_sha1: str | None = None
    """Git's id of a small file, by which the hub knows it."""


class OutputRecord(Wire):
    """Identity and contents of an output. An object store receives it last: it marks the output as complete."""

    namespace: str
    job: str
    job_uid: str
    format: str
    source: str
    """What the output was written from: the checkpoint and the settings of the output."""
    files: tuple[OutputFile, ...]

    @property
    def size_bytes(self) -> int:
        """Size of all files."""
        return sum(file.size_bytes for file in self.files)

    @property
    def sha256(self) -> str:
        """SHA-256 of the file; of several files, that of the lines that sha256sum prints for them."""
        if len(self.files) == 1:
            return self.files[0].sha256
        lines = "".join(f"{file.sha256}  {file.name}\n" for file in self.files)
        return hashlib.sha256(lines.encode()).hexdigest()

    @property
    def marker(self) -> str:
        """Name of the object with this record: one for each job and format of a folder."""
        return marker_name(self.job, self.format)

    @classmethod
    def parse(cls, text: bytes) -> OutputRecord | None:
        """Return the record in a file; None if it is damaged, or of a version that this one cannot read."""
        try:
            return cls.model_validate_json(text)
        except ValidationError:
            return None


MARKER_END = ".output.json"


def marker_name(job: str, output_format: str) -> str:
    """Return the name of the object that marks an output as complete."""
    return f"{job}.{output_format}{MARKER_END}"


@dataclass(frozen=True)
class StagedOutput:
    """A complete output on this machine.

    Attributes:
        record: its files.
        folder: contains them.
        key: identity of the export that has written them, for the names of temporary folders.
    """

    record: OutputRecord
    folder: Path
    key: str

    def path(self, file: OutputFile) -> Path:
        """Return the path of a file."""
        return self.folder / file.name


def describe_file(path: Path, name: str) -> OutputFile:
    """Return size and SHA-256 of a file.

    Raises:
        OSError: it cannot be read.
    """
    digest, size = hashlib.sha256(), path.stat().st_size
    git = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False) if size <= _BLOCK else None
    with path.open("rb") as content:
        while block := content.read(_BLOCK):
            digest.update(block)
            if git is not None:
                git.update(block)
    return OutputFile(
        name=name, size_bytes=size, sha256=digest.hexdigest(), git_sha1=git.hexdigest() if git is not None else None
    )
