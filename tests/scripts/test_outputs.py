"""Outputs of scripts in other formats than the script has written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_contract.exit_codes import ExitCode
from finetune_contract.input_spec import ModelSpec
from finetune_contract.outputs.spec import OutputFormat, OutputSpec
from finetune_trainer.errors import ConfigError
from finetune_trainer.script.arguments import find_base
from finetune_trainer.script.outputs import check_formats
from testing.trainer.script_ranks import ScriptRanks
from testing.trainer.scripts import script_spec


@pytest.fixture(scope="module", name="base")
def _base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from testing.trainer import tiny  # noqa: PLC0415  slow to import

    return tiny.write_base(tmp_path_factory.mktemp("base"))


def _ranks(base: Path, folder: Path, outputs: list[dict[str, Any]], attempt: int = 1, **args: Any) -> ScriptRanks:
    args = {"pretrained_model_name_or_path": str(base), "max_train_steps": 2, "seed": 1, **args}
    return ScriptRanks(script_spec("train_diffusers.py", args, outputs=outputs), folder, attempt=attempt)


@pytest.mark.trainer
def test_a_format_that_does_not_fit_fails_alone_and_can_be_corrected(base: Path, tmp_path: Path) -> None:
    from finetune_trainer.export.formats.merge import read_adapter  # noqa: PLC0415
    from finetune_trainer.models.base import open_base  # noqa: PLC0415

    outputs = [
        {"format": "single-file", "to": "wrong"},
        {"format": "kohya", "to": "kohya"},
        {"format": "asWritten", "to": "copy"},
    ]
    run = _ranks(base, tmp_path, outputs, rank=2)
    assert run.run() == [ExitCode.CONFIG], run.stderr()
    wrong, *others = run.reports()[-1]["unfinishedOutputs"]
    assert not others
    assert (wrong["format"], wrong["state"]) == ("single-file", "Failed")
    assert wrong["message"] == (
        "outputs: a LoRA cannot be written as single-file; write format: diffusers, kohya, merged, openvino or compiled"
    )
    assert [each["format"] for each in run.reports()[-1]["outputs"]] == ["kohya", "asWritten"]
    family = open_base(ModelSpec(base=str(base)))
    name = "pytorch_lora_weights.safetensors"
    written, converted = (
        read_adapter(run.job_dir / "outputs" / path, family, "x").layers
        for path in (f"copy/{name}", "kohya/script.safetensors")
    )
    assert written.keys() == converted.keys() != set()
    for layer, expected in written.items():
        assert (converted[layer].down.read() == expected.down.read()).all()
        factors = converted[layer].scale, expected.scale
        assert (converted[layer].up.read() * factors[0] == expected.up.read() * factors[1]).all()

    assert {path.name for path in (run.job_dir / "outputs").iterdir()} == {"kohya", "copy"}

    outputs[0]["format"] = "merged"
    again = _ranks(base, tmp_path, outputs, attempt=2, rank=2)
    assert again.run() == [0], again.stderr()
    assert [each["format"] for each in again.reports()[-1]["outputs"]] == ["merged", "kohya", "asWritten"]
    assert (again.job_dir / "outputs" / "wrong" / "unet" / "diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.trainer
def test_a_pipeline_of_a_script_becomes_a_single_file(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file  # noqa: PLC0415

    run = _ranks(base, tmp_path, [{"format": "single-file", "to": "file"}])
    assert run.run() == [0], run.stderr()
    found = load_file(run.job_dir / "outputs" / "file" / "script.safetensors")[
        "model.diffusion_model.input_blocks.0.0.weight"
    ]
    part, name = "unet/diffusion_pytorch_model.safetensors", "conv_in.weight"
    assert (found == load_file(run.job_dir / "script" / part)[name]).all()
    assert (found != load_file(base / part)[name]).any()


def test_other_formats_for_an_unknown_family_are_refused_before_the_training(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}), encoding="utf-8")
    model = ModelSpec(base=str(tmp_path))
    with pytest.raises(ConfigError, match=r"is a FluxPipeline, and only .*; write format: asWritten"):
        check_formats([OutputSpec(format=OutputFormat.KOHYA, to="x")], model)
    check_formats([OutputSpec(format=OutputFormat.AS_WRITTEN, to="x")], model)
    # The script itself refuses a base that does not exist.
    check_formats([OutputSpec(format=OutputFormat.KOHYA, to="x")], ModelSpec(base=str(tmp_path / "none")))


def test_the_base_is_that_of_the_command_line() -> None:
    model = ModelSpec(base="me/base", revision="v1", variant="fp16")
    assert find_base(["--pretrained_model_name_or_path", "me/base"], model).model == model
    assert not find_base([], model).flag_is_given
    other = find_base(
        ["--pretrained_model_name_or_path=me/other", "--variant", "bf16", "--pretrained_vae_model_name_or_path", "v"],
        model,
    )
    assert other.model == ModelSpec(base="me/other", variant="bf16", vae="v")
    assert other.flag_is_given
