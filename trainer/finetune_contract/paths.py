"""Layout of a job's folder on shared storage. Both sides read it; only the trainer writes to it."""

from __future__ import annotations

import re
from pathlib import Path

CHECKPOINTS = "checkpoints"
FENCE = "fence"
INPUTS = "inputs"
"""What the first attempt found of the base and the data: one file for each input."""
VALIDATION = "validation"
HANGS = "hangs"
"""Stacks of the ranks of attempts that hung: attempt-N/rank-R.txt."""
OUTPUTS = "outputs"
GRID = "before-after.png"
"""Name of the image, below VALIDATION, that shows the prompts before and after training."""
LOSSES = "losses.json"
"""Name of the file, below VALIDATION, with the held-out losses: a list of {"step", "loss", "byTimestep"}, in order of
the steps; byTimestep holds the loss in each quarter of the noise schedule."""
MANIFEST = "manifest.json"
"""Name of the file that commits a checkpoint; the checkpoint is verified against it."""

CORRUPT = "corrupt-"
"""Prefix of the name of a checkpoint that was found damaged."""
CORRUPT_REASON = "reason.txt"
"""Name of the file, in its folder, that describes the damage."""
_MARK = re.compile(r"attempt-(\d{8})")


def job_folder(namespace: str, job: str, uid: str) -> str:
    """Return the path of a job's folder below the storage's root, e.g. 'default/circles-1f0c3a2b'.

    The UID separates the checkpoints of a deleted job from those of a new job with the same name.
    """
    return f"{namespace}/{job}-{uid[:8]}"


def checkpoints(job_dir: Path) -> Path:
    """Return the folder of the committed checkpoints."""
    return job_dir / CHECKPOINTS


def hang_folder(attempt: int) -> str:
    """Return the path, below the job's folder, of the folder with the stacks of an attempt that hung."""
    return f"{HANGS}/attempt-{attempt}"


def stack_file(job_dir: Path, attempt: int, rank: int) -> Path:
    """Return the file with the stacks of one rank."""
    return job_dir / hang_folder(attempt) / f"rank-{rank}.txt"


def fence(job_dir: Path) -> Path:
    """Return the folder of the fence, which contains the marks of the attempts."""
    return job_dir / FENCE


def fence_mark(attempt: int) -> str:
    """Return the name of an attempt's mark in the fence."""
    return f"attempt-{attempt:08d}"


def marked_attempt(name: str) -> int:
    """Return the attempt of a mark in the fence; 0 for any other name."""
    match = _MARK.fullmatch(name)
    return int(match[1]) if match else 0
