"""Downloads checkpoints of a bucket, so that `finetune checkpoints` can read them like those of a folder."""

from __future__ import annotations

from pathlib import Path

from finetune_contract import paths
from finetune_contract.bucket import Bucket
from finetune_contract.outputs.pictures import fetch_pictures
from finetune_operator.cli.errors import UsageError


class BucketCopy:
    """A local folder that receives the requested checkpoints of a job's folder in a bucket.

    Args:
        url: of the job's folder.
        folder: an empty folder.

    Raises:
        UsageError: the bucket cannot be read; the message contains the cause.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self._folder = folder
        try:
            job = self._job = Bucket(url.rstrip("/").removesuffix(f"/{paths.CHECKPOINTS}"))
            self._bucket = job.below(paths.CHECKPOINTS)
            self._names = self._bucket.names()
            self._corrupt = job.below(paths.CORRUPT.rstrip("-"))
            self._reasons = self._corrupt.names()
            self._download_manifests()
        except OSError as error:
            raise UsageError(str(error)) from error

    def download(self, name: str) -> None:
        """Download all files of a checkpoint.

        Args:
            name: name of its folder in the local copy.

        Raises:
            UsageError: a file cannot be read.
        """
        stored = name.removeprefix(paths.CORRUPT)
        try:
            for each in self._names:
                if each.startswith(f"{stored}/") and not (target := self._target(each)).exists():
                    self._bucket.download(each, target)
        except OSError as error:
            raise UsageError(str(error)) from error

    def download_pictures(self, step: int, folder: Path) -> None:
        """Download the validation pictures of a step into a folder like that of the job.

        Raises:
            UsageError: the bucket cannot be read.
        """
        try:
            fetch_pictures(self._job, folder, step)
        except OSError as error:
            raise UsageError(str(error)) from error

    def _download_manifests(self) -> None:
        for reason in self._reasons:
            self._corrupt.download(reason, self._folder / f"{paths.CORRUPT}{reason}")
        for each in self._names:
            if each.endswith(f"/{paths.MANIFEST}"):
                self._bucket.download(each, self._target(each))

    def _target(self, name: str) -> Path:
        """Return the local path of a file. A corrupt checkpoint gets the prefix that it has on a disk."""
        stored = name.partition("/")[0]
        is_corrupt = any(reason.startswith(f"{stored}/") for reason in self._reasons)
        return self._folder / (f"{paths.CORRUPT}{name}" if is_corrupt else name)
