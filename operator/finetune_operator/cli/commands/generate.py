"""`finetune generate`: draws pictures with an output, a checkpoint or a file, in a process of the trainer."""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from finetune_contract import paths
from finetune_contract.heartbeat import OutputState
from finetune_contract.input_spec import ModelSpec
from finetune_contract.outputs.generation import DrawnCheckpoint, GenerateRequest, GenerateResult
from finetune_operator.api.job import FineTuneJob
from finetune_operator.cli.commands.export import choose_job, open_checkpoint
from finetune_operator.cli.errors import Exit, UsageError
from finetune_operator.cli.output.table import format_columns
from finetune_operator.cluster.local.home import CACHE_CLAIM, Home
from finetune_operator.cluster.local.kubelet.launch import machine_environment
from finetune_operator.manifests import build_run_spec

MODULE = "finetune_trainer.generate.main"
_FLAGS = {"prompts": "prompt", "seeds": "seed", "strengths": "strength", "width": "size", "height": "size"}
"""Flags by the fields of the request that have another name."""
_SIZE = re.compile(r"(\d+)(?:x(\d+))?")


def generate(arguments: argparse.Namespace) -> Exit:
    """Carry out `finetune generate`."""
    home = Home(arguments.home)
    request = read_request(arguments)
    with _with_model(request, arguments, home) as complete:
        command = [sys.executable, "-m", MODULE, complete.model_dump_json(by_alias=True), str(home.claim(CACHE_CLAIM))]
        result = subprocess.run(command, env=machine_environment(), stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        return Exit.FAILED
    sys.stdout.write(format_result(GenerateResult.model_validate_json(result.stdout.splitlines()[-1])))
    return Exit.SUCCEEDED


def read_request(arguments: argparse.Namespace) -> GenerateRequest:
    """Return what the command line requests, without the model of a job.

    Raises:
        UsageError: a flag is missing or has a value that it cannot have.
    """
    width, height = _size(arguments.size)
    try:
        return GenerateRequest(
            model=None if arguments.model is None else _absolute(arguments.model),
            base=None if arguments.base is None else ModelSpec(base=_existing(arguments.base)),
            prompts=_prompts(arguments),
            negative_prompt=arguments.negative_prompt,
            seeds=tuple(arguments.seed) or (0,),
            grid=_absolute(arguments.grid),
            condition=None if arguments.condition is None else _absolute(arguments.condition),
            compare_base=arguments.compare is not None,
            strengths=_strengths(arguments.strength),
            steps=arguments.steps,
            guidance=arguments.guidance,
            width=width,
            height=height,
            device=arguments.device,
            precision=arguments.precision,
        )
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        flag = _FLAGS.get(field, field)
        # Not the message's first word, which is "Input".
        reason = first["msg"].partition(" ")[2]
        raise UsageError(f"--{flag}: {first['input']} is not possible: it {reason}; write another value") from error


def format_result(result: GenerateResult) -> str:
    """Return what is printed: the seconds per image of each column, and the grid."""
    rows = [(each.label, f"{each.seconds_per_image:.2f}") for each in result.columns]
    count = sum(len(each.seconds) for each in result.columns)
    size = f"{result.width} x {result.height}"
    return (
        format_columns(("COLUMN", "SECONDS PER IMAGE"), rows)
        + f"\n{count} pictures of {size} on {result.device}: {result.grid}\n"
    )


@contextlib.contextmanager
def _with_model(request: GenerateRequest, arguments: argparse.Namespace, home: Home) -> Iterator[GenerateRequest]:
    """Yield the request with the model of the job: an output on this machine, or else a checkpoint.

    Raises:
        UsageError: the job has neither on this machine.
    """
    if arguments.model is not None:
        yield request
        return
    job, location = choose_job(arguments, home)
    changes: dict[str, object] = {"name": job.metadata.name, "base": request.base or job.spec.model}
    found = None if arguments.step is not None else find_output(job, location, arguments.format)
    if found is not None:
        yield request.model_copy(update={**changes, "model": str(found)})
        return
    if arguments.format is not None or job.spec.training.method is None:
        what = f"output of format {arguments.format}" if arguments.format else "output"
        raise UsageError(
            f"--job: {job.metadata.name} has no complete {what} on this machine; write the path of one as --model"
        )
    with open_checkpoint(location, arguments.step) as folder, tempfile.TemporaryDirectory(prefix="generate-") as name:
        run = Path(name) / "run.json"
        run.write_text(build_run_spec(job).to_json(), encoding="utf-8")
        checkpoint = DrawnCheckpoint(run=str(run), folder=str(folder))
        yield request.model_copy(update={**changes, "checkpoint": checkpoint})


def find_output(job: FineTuneJob, location: str, chosen: str | None) -> Path | None:
    """Return the first complete output of a job that is on this machine; None if there is none.

    Args:
        job: the job.
        location: the job's folder, or the URL of its folder in a bucket.
        chosen: the format; None for any.
    """
    written = [(each.format, Path(each.to)) for each in job.status.outputs if each.state is OutputState.WRITTEN]
    if not job.status.outputs and "://" not in location:
        # The job ran on a cluster, and its folder is mounted here.
        of_job = Path(location) / paths.OUTPUTS
        written = [(each.format.value, of_job / Path(each.to).name) for each in job.spec.outputs]
    return next((path for name, path in written if path.exists() and chosen in (None, name)), None)


def _prompts(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Return the prompts of the flags, then those of the file, one per line."""
    prompts = list(arguments.prompt)
    if arguments.prompts is not None:
        try:
            lines = arguments.prompts.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--prompts: {arguments.prompts} cannot be read ({error}); write a text file") from error
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError("--prompt: no prompt is given; write --prompt 'a photo of ...', or --prompts FILE")
    return tuple(prompts)


def _strengths(text: str | None) -> tuple[float, ...]:
    if text is None:
        return ()
    try:
        return tuple(float(each) for each in text.split(","))
    except ValueError:
        raise UsageError(f"--strength: {text!r} is no list of numbers; write e.g. 0,0.5,1") from None


def _size(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"--size: {text!r} is no size; write e.g. 512, or 768x512 for width and height")
    return int(match[1]), int(match[2] or match[1])


def _absolute(text: str) -> str:
    return text if "://" in text else str(Path(text).expanduser().absolute())


def _existing(text: str) -> str:
    """Return a base: a path if it exists, otherwise a hub id or URL as it is."""
    path = Path(text).expanduser()
    return str(path.absolute()) if path.exists() else text
