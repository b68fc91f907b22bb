"""What an output says about itself: the job, its settings and its pictures. Model cards and metadata are made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_contract.outputs.pictures import find_pictures
from finetune_contract.run_spec import RunSpec


@dataclass(frozen=True)
class About:
    """The origin of an output.

    Attributes:
        name: name of the job; files are named after it.
        run: the run; None if the weights are not from a job's training, e.g. those of a script.
        step: the last step; None if unknown.
        pictures: validation pictures of the trained weights.
        cache: folder for files that are fetched.
    """

    name: str
    run: RunSpec | None = None
    step: int | None = None
    pictures: Sequence[Path] = ()
    cache: Path | None = None

    @property
    def trigger_phrase(self) -> str | None:
        """Return the words that the training gave to what it learned; None if there are none."""
        training = None if self.run is None else self.run.training
        if training is not None and training.dreambooth is not None:
            return training.dreambooth.instance_prompt
        if training is not None and training.textual_inversion is not None:
            return training.textual_inversion.placeholder_token
        return None

    @staticmethod
    def of_run(run: RunSpec, job_dir: Path | None, cache: Path | None, step: int | None = None) -> About:
        """Return the origin of the outputs of a run, with the pictures that its validation has drawn last."""
        found = [] if job_dir is None else find_pictures(job_dir)
        last = found[-1].name.rsplit("-", 1)[0] if found else ""
        pictures = [path for path in found if path.name.startswith(f"{last}-")]
        return About(run.job, run, step or run.training.steps, pictures, cache)

    @staticmethod
    def of_checkpoint(run: RunSpec, job_dir: Path, cache: Path, step: int) -> About:
        """Return the origin of the outputs of a checkpoint, with the pictures that the validation drew at its step."""
        return About(run.job, run, step, find_pictures(job_dir, step), cache)


NO_ORIGIN = About("model")
"""For weights of which nothing is known."""
