"""`finetune export` names what its user has written: flags, or the outputs of the job."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from finetune_operator.api.job import FineTuneJob
from finetune_operator.cli.commands.export import run_trainer
from finetune_operator.cli.commands.export_on_cluster import choose_request
from finetune_operator.cli.commands.exported import ChosenOutputs, choose_outputs
from finetune_operator.cli.errors import UsageError
from finetune_operator.cli.main import parser
from testing.operator.harness import build_job

OUTPUTS = [
    {"format": "diffusers", "to": "s3://models/a"},
    {"format": "kohya", "to": "s3://models/b", "precision": "fp16", "secret": {"name": "store"}},
]


def _job(outputs: Any) -> FineTuneJob:
    return FineTuneJob.model_validate(build_job("circles", outputs=outputs))


def choose(*flags: str, outputs: Any = OUTPUTS) -> ChosenOutputs:
    arguments = parser().parse_args(["export", "circles", *flags])
    return choose_outputs(arguments, _job(outputs), str, lambda _: True)


@pytest.mark.parametrize(
    ("flags", "message", "expected"),
    [
        (["--to", "/a"], "outputs[0].to: /a holds", "--to: /a holds"),
        (["--to", "/a", "--to", "/b"], "outputs[1].to: /b holds", "--to /b: /b holds"),
        (["--to", "/a", "--format", "kohya"], "spec.outputs[0].format: no", "--format: no"),
        (["--to", "s3://m", "--secret", "s"], "spec.outputs[0].secret.name: no", "--secret: no"),
        # Not given by a flag: the settings are those of the job's output of this format.
        (["--to", "/a", "--format", "kohya"], "outputs[0].precision: no", "spec.outputs[1].precision: no"),
        (["--format", "kohya"], "outputs[0].to: the bucket", "spec.outputs[1].to: the bucket"),
        (["--to", "/a"], "outputs[0].format: no", "spec.outputs[0].format: no"),
        ([], "outputs: the disk", "outputs: the disk"),
        ([], "outputs[7].to: of another", "outputs[7].to: of another"),
    ],
)
def test_messages_name_what_was_written(flags: list[str], message: str, expected: str) -> None:
    assert choose(*flags).name_fields(message) == expected


def test_a_job_without_outputs_is_exported_with_defaults() -> None:
    assert choose("--to", "/a", outputs=[]).name_fields("outputs[0].format: no") == "--format: no"


def test_a_target_is_given_once() -> None:
    with pytest.raises(UsageError, match=r"^--to: /a is given twice; write each folder or URL once$"):
        choose("--to", "/a", "--to", "/a")


def test_a_request_to_the_operator_names_flags() -> None:
    arguments = parser().parse_args(["export", "circles", "--cluster", "--to", "ftp://host/x"])
    with pytest.raises(UsageError, match=r"^--to: .*write a folder, e\.g"):
        choose_request(arguments, _job(OUTPUTS))


def test_the_log_of_the_trainer_names_flags(capsys: pytest.CaptureFixture[str]) -> None:
    """A process that behaves as the trainer's."""
    program = "import sys; print('line'); sys.stderr.write('outputs[0].to: /a holds\\n'); sys.exit(int(sys.argv[1]))"
    assert run_trainer([sys.executable, "-c", program, "0"], choose("--to", "/a")) == ["line"]
    assert run_trainer([sys.executable, "-c", program, "64"], choose("--to", "/a")) is None
    assert capsys.readouterr().err == "--to: /a holds\n" * 2
