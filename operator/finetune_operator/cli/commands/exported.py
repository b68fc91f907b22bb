"""The outputs that `finetune export` writes, and how messages name their fields: by flags, or as in the manifest."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from finetune_contract.outputs.spec import OutputFormat, OutputSecret, OutputSpec
from finetune_operator.api.job import FineTuneJob
from finetune_operator.cli.errors import UsageError

_FIELD = re.compile(r"\b(?:spec\.)?outputs\[(\d+)\]((?:\.\w+)*)")


@dataclass(frozen=True)
class ChosenOutputs:
    """The outputs of one call, and what its user has written for them.

    Attributes:
        outputs: the outputs.
        numbers: for each output the index of the job's output with its settings; None: it has none.
        flags: fields that are flags of this call.
    """

    outputs: tuple[OutputSpec, ...]
    numbers: tuple[int | None, ...]
    flags: frozenset[str]

    def name_fields(self, message: str) -> str:
        """Return a message about `outputs[0].to` with the flag --to, or with the output of the job."""
        return _FIELD.sub(self._name, message)

    def _name(self, found: re.Match[str]) -> str:
        number, path = int(found[1]), found[2]
        field = path.removeprefix(".").partition(".")[0]
        if number >= len(self.outputs):
            return found[0]
        if field in self.flags:
            is_one_of = field == "to" and len(self.outputs) > 1
            return f"--to {self.outputs[number].to}" if is_one_of else f"--{field}"
        of_job = self.numbers[number]
        if of_job is not None:
            return f"spec.outputs[{of_job}]{path}"
        # All its other fields have their defaults.
        return f"--{field}" if field in ("format", "secret") else found[0]


def choose_outputs(
    arguments: argparse.Namespace,
    job: FineTuneJob,
    to_absolute: Callable[[str], str],
    is_reachable: Callable[[OutputSpec], bool],
) -> ChosenOutputs:
    """Return the requested outputs; by default those of the job.

    With --to, they have the settings of the job's first output of the format.

    Args:
        arguments: the command line.
        job: the job.
        to_absolute: returns a location of --to as the one who writes the output finds it.
        is_reachable: whether an output of the job can be written from here.

    Raises:
        UsageError: it is not known where to write to, or a target is given twice.
    """
    chosen = OutputFormat(arguments.format) if arguments.format else None
    matching = [number for number, output in enumerate(job.spec.outputs) if chosen in (None, output.format)]
    if not arguments.to:
        reached = [number for number in matching if is_reachable(job.spec.outputs[number])]
        if not reached:
            raise UsageError("--to: write the folder or URL to write to: the job names none for this format")
        return ChosenOutputs(tuple(job.spec.outputs[number] for number in reached), tuple(reached), frozenset())
    locations = [to_absolute(to) for to in arguments.to]
    twice = [to for to, count in Counter(locations).items() if count > 1]
    if twice:
        raise UsageError(f"--to: {twice[0]} is given twice; write each folder or URL once")
    number = matching[0] if matching else None
    model = OutputSpec(format=chosen or OutputFormat.DIFFUSERS, to=".") if number is None else job.spec.outputs[number]
    secret = OutputSecret(name=arguments.secret) if arguments.secret else model.secret
    flags = {"to"} | ({"format"} if arguments.format else set()) | ({"secret"} if arguments.secret else set())
    return ChosenOutputs(
        tuple(model.model_copy(update={"to": to, "secret": secret}) for to in locations),
        (number,) * len(locations),
        frozenset(flags),
    )
