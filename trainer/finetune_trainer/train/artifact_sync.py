"""Copies validation results between the job's local folder and its object store.

They are always written to the local folder first. Only rank 0 calls this module.
"""

from __future__ import annotations

from pathlib import Path

from finetune_contract import paths
from finetune_contract.bucket import Bucket
from finetune_trainer.errors import StorageError


class ArtifactSync:
    """Syncs a job's local folder with its folder in the store; does nothing without a store."""

    def __init__(self, job_dir: Path, bucket: Bucket | None) -> None:
        self._job_dir = job_dir
        self._bucket = bucket
        self._known: dict[str, tuple[int, int]] = {}
        """Size and modification time of files that are identical here and in the store."""

    def pull_validation(self) -> None:
        """Fetch the results of earlier attempts. Local files are kept: they are from the same job, and newer.

        Raises:
            StorageError: the store cannot be read.
        """
        if self._bucket is None:
            return
        try:
            folder = self._bucket.below(paths.VALIDATION)
            for name in folder.names():
                path = self._job_dir / paths.VALIDATION / name
                if not path.exists():
                    folder.download(name, path)
                    self._known[f"{paths.VALIDATION}/{name}"] = _stamp(path)
        except OSError as error:
            raise StorageError(f"validation: {error}") from error

    def push_validation(self) -> None:
        """Copy validation results to the store.

        Raises:
            StorageError: the store cannot be written.
        """
        self._push(paths.VALIDATION)

    def _push(self, what: str) -> None:
        if self._bucket is None:
            return
        try:
            for path in sorted((self._job_dir / what).rglob("*")):
                name, stamp = path.relative_to(self._job_dir).as_posix(), _stamp(path)
                if path.is_file() and self._known.get(name) != stamp:
                    self._bucket.upload(name, path)
                    self._known[name] = stamp
        except OSError as error:
            raise StorageError(f"{what}: {error}") from error


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
