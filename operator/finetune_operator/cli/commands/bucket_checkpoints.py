"""Checkpoints of a bucket, brought to this machine so that `checkpoints` can read them like those of a folder."""

from __future__ import annotations

from pathlib import Path

from finetune_contract import paths
from finetune_contract.bucket import Bucket
from finetune_operator.cli.errors import UsageError


class BucketCopy:
    """A folder of this machine that gets what is asked for of a job's folder in a bucket.

    Args:
        url: of the job's folder.
        folder: an empty folder.

    Raises:
        UsageError: the bucket cannot be read; the text says why.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self._folder = folder
        try:
            job = Bucket(url.rstrip("/").removesuffix(f"/{paths.CHECKPOINTS}"))
            self._bucket = job.below(paths.CHECKPOINTS)
            self._names = self._bucket.names()
            self._corrupt = job.below(paths.CORRUPT.rstrip("-"))
            self._reasons = self._corrupt.names()
            self._bring_manifests()
        except OSError as error:
            raise UsageError(str(error)) from error

    def bring(self, name: str) -> None:
        """Bring all files of a checkpoint, by the name of its folder here.

        Raises:
            UsageError: they cannot be read.
        """
        stored = name.removeprefix(paths.CORRUPT)
        try:
            for each in self._names:
                if each.startswith(f"{stored}/") and not (target := self._place(each)).exists():
                    self._bucket.download(each, target)
        except OSError as error:
            raise UsageError(str(error)) from error

    def _bring_manifests(self) -> None:
        for reason in self._reasons:
            self._corrupt.download(reason, self._folder / f"{paths.CORRUPT}{reason}")
        for each in self._names:
            if each.endswith(f"/{paths.MANIFEST}"):
                self._bucket.download(each, self._place(each))

    def _place(self, name: str) -> Path:
        """One that was set aside has a reason; on a disk its name would say so."""
        stored = name.partition("/")[0]
        is_aside = any(reason.startswith(f"{stored}/") for reason in self._reasons)
        return self._folder / (f"{paths.CORRUPT}{name}" if is_aside else name)
