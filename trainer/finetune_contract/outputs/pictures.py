"""The validation pictures of one step, in the folder of a job or in its bucket. Outputs show them."""

from __future__ import annotations

from pathlib import Path

from finetune_contract import paths
from finetune_contract.bucket import Bucket

FOLDER = f"{paths.VALIDATION}/pictures"


def find_pictures(job_dir: Path, step: int | None = None) -> list[Path]:
    """Return the pictures that the validation has drawn at a step, or at all steps, sorted."""
    return sorted((job_dir / FOLDER).glob(f"step-{'*' if step is None else f'{step:08}'}-*.png"))


def fetch_pictures(bucket: Bucket, job_dir: Path, step: int) -> None:
    """Download the pictures of a step into the folder of a job.

    Args:
        bucket: the job's folder in a bucket.
        job_dir: the job's folder on this machine.
        step: the step.

    Raises:
        OSError: the bucket cannot be read.
    """
    stored = bucket.below(FOLDER)
    for name in stored.names():
        path = job_dir / FOLDER / name
        if name.startswith(f"step-{step:08}-") and not path.exists():
            # A process that is killed leaves no damaged picture.
            partial = path.with_suffix(".part")
            stored.download(name, partial)
            partial.replace(path)
