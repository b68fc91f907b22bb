"""Whose files a folder contains, so that a job replaces neither those of another job nor those of its user.

Each job that delivers to a folder lists its files in a hidden file of the folder:

    .default.circles.outputs.json      {"namespace": "default", "job": "circles", "files": ["circles.safetensors"]}
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from finetune_contract.heartbeat import Wire
from finetune_trainer.files import write_atomically

MANIFEST = "finetune-job.json"
"""Manifest of the job, in the folders of models that it has written."""
_END = ".outputs.json"


class Claim(Wire):
    """The files of one job in a folder."""

    namespace: str
    job: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class FolderClaims:
    """The claims on the files of a folder, as one job sees them.

    Attributes:
        folder: the folder; it may not exist.
        namespace: namespace of the job.
        job: name of the job.
    """

    folder: Path
    namespace: str
    job: str

    def find_conflict(self, names: Iterable[str]) -> str:
        """Return whose file would be replaced, for a message; empty if nobody's.

        Args:
            names: files that the job writes. If there are none, they are not known yet: no other job may have files
                here that are not named after it.

        Raises:
            OSError: the folder cannot be read.
        """
        names = tuple(names)
        claims = [] if not self.folder.is_dir() else self._read()
        own = {name for claim in claims if self._is_own(claim) for name in claim.files}
        existing = [name for name in names if name not in own and (self.folder / name).is_file()]
        for claim in claims:
            if self._is_own(claim):
                continue
            unclear = not names and not is_named_after_job(claim.job, claim.files)
            if unclear or not set(existing).isdisjoint(claim.files):
                return describe_other(claim.namespace, claim.job)
        author = self._author() if existing else None
        if author is not None and (author.namespace, author.job) != (self.namespace, self.job):
            return describe_other(author.namespace, author.job)
        if author is None and (unknown := [name for name in existing if not is_named_after_job(self.job, [name])]):
            return f"holds {unknown[0]}, which this job has not written and which would be replaced"
        return ""

    def write(self, names: Iterable[str], folder: Path | None = None) -> None:
        """Add files to the claim of the job.

        Args:
            names: the files.
            folder: a folder that will replace this one; None: this one.

        Raises:
            OSError: the claim cannot be written.
        """
        earlier = (claim for claim in (self._read() if self.folder.is_dir() else ()) if self._is_own(claim))
        kept = {name for claim in earlier for name in claim.files if (self.folder / name).is_file()}
        claim = Claim(namespace=self.namespace, job=self.job, files=tuple(sorted(kept | set(names))))
        path = (folder or self.folder) / f".{self.namespace}.{self.job}{_END}"
        write_atomically(path, f"{json.dumps(claim.model_dump(by_alias=True), indent=1)}\n".encode())

    def _read(self) -> list[Claim]:
        texts = (_read_bytes(path) for path in sorted(self.folder.glob(f".*{_END}")))
        found = (parse_claim(text) for text in texts if text is not None)
        return [claim for claim in found if claim is not None]

    def _is_own(self, claim: Claim) -> bool:
        return (claim.namespace, claim.job) == (self.namespace, self.job)

    def _author(self) -> Claim | None:
        """Return the job whose manifest is in the folder: older releases wrote no claim."""
        text = _read_bytes(self.folder / MANIFEST)
        return None if text is None else parse_author(text)


def _read_bytes(path: Path) -> bytes | None:
    """Return the contents of a file; None if it does not exist, or only its owner may read it."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, PermissionError):
        return None


def parse_claim(text: bytes) -> Claim | None:
    """Return a claim; None if it is damaged, or of a version that this one cannot read."""
    try:
        return Claim.model_validate_json(text)
    except ValidationError:
        return None


def parse_author(text: bytes) -> Claim | None:
    """Return the job of a manifest, without files; None if it names none."""
    try:
        found = json.loads(text)
        return Claim(namespace=found["namespace"], job=found["job"], files=())
    except (ValueError, KeyError, TypeError):
        return None


def is_named_after_job(job: str, names: Iterable[str]) -> bool:
    """Return whether all files have the name of a job, so that other jobs can write to the same place."""
    return all(name.rpartition(".")[0] == job for name in names)


def describe_other(namespace: str, job: str) -> str:
    """Return what another job has at a target, for a message."""
    return f"holds an output of another job, {namespace}/{job}, whose files would be replaced"


def conflict_message(field: str, location: str, conflict: str) -> str:
    """Return the message for an output that would replace files of somebody else."""
    return f"{field}: {location} {conflict}; write another folder, or delete that output"
