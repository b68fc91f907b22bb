"""The layout of a job's folder on shared storage. Both sides read it; only the trainer writes below it."""

from __future__ import annotations

import re
from pathlib import Path

CHECKPOINTS = "checkpoints"
FENCE = "fence"
VALIDATION = "validation"
HANGS = "hangs"
"""Stacks of the ranks of attempts that stood still: attempt-N/rank-R.txt."""
OUTPUTS = "outputs"
GRID = "before-after.png"
"""Name of the picture, below VALIDATION, that shows the prompts before and after."""
LOSSES = "losses.json"
"""Name of the file, below VALIDATION, with the held-out losses: a list of {"step", "loss", "byTimestep"}, in order; the
last one is the loss in each quarter of the noise schedule."""
MANIFEST = "manifest.json"
"""Name of the file that makes a checkpoint count: it is verified against it."""

CORRUPT = "corrupt-"
"""Before the name of a checkpoint that was found damaged and set aside."""
CORRUPT_REASON = "reason.txt"
"""Name of the file in it that says what was wrong."""
_MARK = re.compile(r"attempt-(\d{8})")


def job_folder(namespace: str, job: str, uid: str) -> str:
    """Name of a job's folder below the storage's root, e.g. 'default/circles-1f0c3a2b'.

    The UID keeps a job that was deleted and made anew under the same name out of its predecessor's checkpoints.
    """
    return f"{namespace}/{job}-{uid[:8]}"


def checkpoints(job_dir: Path) -> Path:
    """Folder of the committed checkpoints."""
    return job_dir / CHECKPOINTS


def hang_folder(attempt: int) -> str:
    """Name, below the job's folder, of the folder with the stacks of an attempt that stood still."""
    return f"{HANGS}/attempt-{attempt}"


def stack_file(job_dir: Path, attempt: int, rank: int) -> Path:
    """File with the stacks of one rank."""
    return job_dir / hang_folder(attempt) / f"rank-{rank}.txt"


def fence(job_dir: Path) -> Path:
    """Folder of the attempt marks."""
    return job_dir / FENCE


def fence_mark(attempt: int) -> str:
    """Name of an attempt's mark in the fence."""
    return f"attempt-{attempt:08d}"


def marked_attempt(name: str) -> int:
    """The attempt that a mark of the fence is of; 0 for anything else."""
    match = _MARK.fullmatch(name)
    return int(match[1]) if match else 0
