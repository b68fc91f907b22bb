"""`finetune generate`: what its flags request, which output of a job it chooses, and pictures of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from finetune_contract.outputs.generation import DrawnColumn, GenerateResult
from finetune_operator.api.job import FineTuneJob
from finetune_operator.cli.commands.generate import find_output, format_result, generate, read_request
from finetune_operator.cli.errors import Exit, UsageError
from finetune_operator.cli.main import parser
from testing.trainer import tiny
from testing.trainer.methods import make_method
from tests.trainer.checkpoint.test_export import fill, save

pytestmark = pytest.mark.trainer
GOOD = ["generate", "--model", "/m", "--grid", "/g.png"]


def test_a_checkpoint_of_a_manifest_draws(
    base: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without an output on this machine, with the real process of the trainer."""
    spec = tiny.make_spec(base, data)
    method = make_method(base, "LoRA", lora={"rank": 2})
    fill(method, 1.0)
    save(tmp_path / "job", spec, method, 4)
    tiny.write_manifest(tmp_path / "job.yaml", spec)
    words = ["generate", "--home", str(tmp_path / "home"), "--job", str(tmp_path / "job.yaml")]
    words += ["--folder", str(tmp_path / "job"), "--prompt", "a", "--steps", "1", "--strength", "0,1"]
    words += ["--compare", "base", "--grid", str(tmp_path / "grid.png")]
    assert generate(parser().parse_args(words)) is Exit.SUCCEEDED
    printed = capfd.readouterr().out.splitlines()
    assert printed[0].split() == ["COLUMN", "SECONDS", "PER", "IMAGE"]
    assert [line.rsplit(maxsplit=1)[0] for line in printed[1:4]] == ["base", "strength 0", "strength 1"]
    assert all(float(line.split()[-1]) > 0 for line in printed[1:4])
    assert printed[-1] == f"3 pictures of 16 x 16 on cpu, float32: {tmp_path / 'grid.png'}"
    with Image.open(tmp_path / "grid.png") as grid:
        first, second, third = (grid.crop((220 + 140 * each, 32, 348 + 140 * each, 160)) for each in range(3))
    assert first.tobytes() == second.tobytes() != third.tobytes()


def test_the_output_of_a_job_is_chosen(tmp_path: Path) -> None:
    for name in ("first", "second", "job/outputs/lora"):
        (tmp_path / name).mkdir(parents=True)
    states = [("diffusers", "Failed", "first"), ("kohya", "Written", "gone"), ("merged", "Written", "second")]
    outputs = [{"format": name, "state": state, "to": str(tmp_path / to), "bytes": 1} for name, state, to in states]
    spec = {
        "model": {"base": "/base"},
        "dataset": {"source": "/data"},
        "training": {"method": "LoRA", "steps": 1, "lora": {"rank": 2}},
        "outputs": [{"format": "kohya", "to": "gone"}, {"format": "diffusers", "to": "lora"}],
    }
    job = FineTuneJob.model_validate({"metadata": {"name": "a"}, "spec": spec, "status": {"outputs": outputs}})
    where = str(tmp_path / "job")
    assert find_output(job, where, None) == tmp_path / "second"
    assert find_output(job, where, "merged") == tmp_path / "second"
    assert find_output(job, where, "diffusers") is None
    of_cluster = FineTuneJob.model_validate({"metadata": {"name": "a"}, "spec": spec})
    assert find_output(of_cluster, where, None) == tmp_path / "job" / "outputs" / "lora"
    assert find_output(of_cluster, "s3://bucket/a", None) is None


def test_the_flags_become_a_request(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one cat\n\n  two cats \n", encoding="utf-8")
    words = [*GOOD, "--prompt", "a dog", "--prompts", str(tmp_path / "prompts.txt"), "--seed", "1", "--seed", "2"]
    request = read_request(parser().parse_args([*words, "--strength", "0,0.5,1", "--size", "768x512"]))
    assert request.prompts == ("a dog", "one cat", "two cats")
    assert (request.seeds, request.strengths) == ((1, 2), (0.0, 0.5, 1.0))
    assert (request.width, request.height, request.compare_base, request.base) == (768, 512, False, None)
    based = read_request(parser().parse_args([*GOOD, "--prompt", "a", "--base", "me/base", "--compare", "base"]))
    assert based.base is not None
    assert (based.base.base, based.compare_base, based.seeds) == ("me/base", True, (0,))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--prompt: no prompt is given; write --prompt"),
        (["--prompts", "/gone"], "--prompts: /gone cannot be read .*; write a text file"),
        (["--prompt", "a", "--strength", "half"], "--strength: 'half' is no list of numbers; write e.g. 0,0.5,1"),
        (["--prompt", "a", "--size", "big"], "--size: 'big' is no size; write e.g. 512, or 768x512"),
        (["--prompt", "a", "--size", "4"], "--size: 4 is not possible: it should be greater than or equal to 8; write"),
        (["--prompt", "a", "--steps", "0"], "--steps: 0 is not possible: it should be greater than or equal to 1"),
        (["--prompt", "a", "--guidance", "-1"], "--guidance: -1.0 is not possible: it should be greater than"),
    ],
)
def test_bad_flags_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_request(parser().parse_args([*GOOD, *words]))


def test_an_unknown_job_is_named(tmp_path: Path) -> None:
    words = ["generate", "--home", str(tmp_path), "--job", "gone", "--prompt", "a", "--grid", "grid.png"]
    with pytest.raises(UsageError, match=r"no job gone .* for a job on a cluster, give its manifest and --folder"):
        generate(parser().parse_args(words))


def test_the_first_picture_warms_up() -> None:
    column = DrawnColumn(label="base", seconds=(9.0, 1.0, 2.0))
    assert column.seconds_per_image == pytest.approx(1.5)
    assert DrawnColumn(label="base", seconds=(9.0,)).seconds_per_image == 9.0
    result = GenerateResult(grid="/g.png", device="cpu, float32", width=16, height=8, columns=(column,))
    assert format_result(result) == (
        "COLUMN   SECONDS PER IMAGE\nbase     1.50\n\n3 pictures of 16 x 8 on cpu, float32: /g.png\n"
    )
