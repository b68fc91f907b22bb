"""What lies beside the checkpoints where these go to an object store: validation results and outputs.

They are written into the job's local folder as ever, and this copies them to the store and back. Called by rank 0 only.
"""

from __future__ import annotations

from pathlib import Path

from finetune_contract import paths
from finetune_contract.bucket import Bucket
from finetune_contract.heartbeat import WrittenOutput
from finetune_trainer.errors import StorageError


class ArtifactSync:
    """A job's local folder and its folder in the store; without a store it does nothing."""

    def __init__(self, job_dir: Path, bucket: Bucket | None) -> None:
        self._job_dir = job_dir
        self._bucket = bucket
        self._known: dict[str, tuple[int, int]] = {}
        """Size and time of change of what is in the store as it is here."""

    def pull_validation(self) -> None:
        """Bring what earlier attempts have noted; what is here already is of this very job, and newer.

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
        """Copy what was noted.

        Raises:
            StorageError: the store cannot be written.
        """
        self._push(paths.VALIDATION)

    def push_outputs(self, outputs: tuple[WrittenOutput, ...]) -> tuple[WrittenOutput, ...]:
        """Copy the outputs, and say where they are.

        Raises:
            StorageError: the store cannot be written.
        """
        self._push(paths.OUTPUTS)
        return tuple(output.model_copy(update={"to": self._place(output.to)}) for output in outputs)

    def _place(self, to: str) -> str:
        path = Path(to)
        if self._bucket is None or not path.is_relative_to(self._job_dir):
            return to
        return f"{self._bucket.url}/{path.relative_to(self._job_dir).as_posix()}"

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
