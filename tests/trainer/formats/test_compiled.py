"""The format `compiled`: a real package is compiled, loaded by the loader next to it, and compared with eager mode."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from finetune_contract.outputs.generation import GenerateRequest
from finetune_contract.outputs.spec import OutputFormat, OutputPrecision, OutputSpec
from finetune_contract.requirements import find_missing_export
from finetune_trainer.delivery.open import DeliveryPlace
from finetune_trainer.errors import ConfigError
from finetune_trainer.export.formats import compile_denoiser, compiled
from finetune_trainer.export.formats.about import About
from finetune_trainer.export.formats.write import write_format
from finetune_trainer.export.outputs import check_targets
from finetune_trainer.generate.main import draw
from testing.trainer import tiny
from testing.trainer.methods import SETTINGS, export, make_method

pytestmark = pytest.mark.trainer
COMPILED = OutputSpec(format=OutputFormat.COMPILED, to=".")


def import_loader(folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location("load_compiled", folder / compiled.LOADER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pictures(pipeline: Any, prompt: str | list[str], **options: Any) -> np.ndarray[Any, Any]:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    drawn = pipeline(prompt, num_inference_steps=2, generator=generator, output_type="np", **options).images
    return np.asarray(drawn)


@pytest.mark.timeout(900)
def test_a_compiled_pipeline_draws_as_eager_mode(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One package for all of it: compiling takes most of a minute on one core. SDXL has all conditions."""
    base = tiny.write_base(tmp_path / "base", family="sdxl", second_width=2 * tiny.WIDTH)
    method = make_method(base, "Full")
    with torch.no_grad():
        for parameter in method.parameters().values():
            parameter.mul_(1.05)
    eager, folder = tmp_path / "eager", tmp_path / "compiled"
    for each in (eager, folder):
        each.mkdir()
    export(method, OutputFormat.DIFFUSERS, eager)
    run = tiny.make_spec(base, tmp_path, **SETTINGS["Full"])
    with caplog.at_level("INFO"), method.trained() as trained:
        files = write_format(trained, COMPILED, folder, About("tiny", run, 6))
    names = {path.relative_to(folder).as_posix() for path in files}
    assert {"unet/unet.pt2", "unet/config.json", "compiled.json", "load_compiled.py", "README.md"} <= names
    assert not any(name.startswith("unet/") and name.endswith(".safetensors") for name in names)

    facts = json.loads((folder / "compiled.json").read_text())
    assert (facts["device"], facts["width"], facts["height"], facts["precision"]) == ("cpu", 16, 16, "fp32")
    assert facts["speedUp"] == pytest.approx(facts["eagerSeconds"] / facts["compiledSeconds"], abs=0.01)
    assert facts["maxDifference"] < 1e-4
    assert facts["conditions"] == ["text_embeds", "time_ids"]
    speed = f"{facts['speedUp']} times as fast"
    assert speed in caplog.text and speed in (folder / "README.md").read_text()
    assert "from load_compiled import load" in (folder / "README.md").read_text()

    loader = import_loader(folder)
    pipeline, expected = loader.load(folder), diffusers.DiffusionPipeline.from_pretrained(eager)
    for prompt, options in (("a", {}), (["a", "b"], {}), ("a", {"guidance_scale": 1.0})):
        found = pictures(pipeline, prompt, **options)
        assert found.shape == (1 if prompt == "a" else 2, 16, 16, 3)
        assert np.abs(found - pictures(expected, prompt, **options)).max() < 1e-3
    with pytest.raises(ValueError, match="compiled for pictures of 16 x 16; draw them in this size"):
        pictures(pipeline, "a", width=32, height=32)
    with pytest.raises(ValueError, match="compiled for 16 inputs at most; draw fewer pictures"):
        pictures(pipeline, ["a"] * 9)
    with pytest.raises(ValueError, match="no cross_attention_kwargs; use the output of format diffusers"):
        pictures(pipeline, "a", cross_attention_kwargs={"scale": 0.5})

    request = GenerateRequest(model=str(folder), grid="grid.png", prompts=("a",), steps=2)
    result, ((picture,),) = draw(request, tmp_path / "cache")
    assert (result.columns[0].label, result.width, result.height) == ("compiled", 16, 16)
    drawn = pictures(expected, "a", guidance_scale=request.guidance)
    assert np.abs(np.asarray(picture) / 255 - drawn[0]).max() < 2 / 255

    other = json.dumps({**facts, "machine": "a CPU with OTHER and torch 1.0"})
    (folder / "compiled.json").write_text(other)
    with pytest.raises(RuntimeError, match=r"compiled for a CPU with OTHER and torch 1.0, and this machine has"):
        loader.load(folder)
    with pytest.raises(ConfigError, match=r"--model: .* is compiled for a CPU with OTHER"):
        draw(request, tmp_path / "cache")


def test_a_unet_without_the_conditions_of_sdxl_has_three_inputs(base: Path) -> None:
    unet = diffusers.UNet2DConditionModel.from_pretrained(base / "unet")
    inputs = compile_denoiser.example_inputs(unet, base, (8, 8), "cpu")
    assert [tuple(each.shape) for each in inputs] == [(2, 4, 8, 8), (2,), (2, tiny.NUM_TOKENS, tiny.WIDTH)]
    assert compile_denoiser.Positional(unet, [])(*inputs).shape == (2, 4, 8, 8)


def test_a_compiler_is_needed_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (message,) = find_missing_export([OutputSpec(format="diffusers", to="."), COMPILED], which=lambda _: None)
    assert message == (
        "outputs[1].format: compiled needs a C++ compiler, which is not installed here; install g++, or write format: "
        "diffusers"
    )
    assert list(find_missing_export([COMPILED], which=lambda name: f"/usr/bin/{name}")) == []
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"outputs\[0\]\.format: compiled needs a C"):
        check_targets([COMPILED], DeliveryPlace(tmp_path))


def test_parts_that_are_no_complete_model_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a ControlNet cannot be written as compiled; write format: diffusers"):
        export(make_method(base, "ControlNet"), COMPILED, tmp_path)


def test_a_failed_compilation_names_the_remedy(tmp_path: Path) -> None:
    """The real process fails on a folder without a model."""
    with pytest.raises(ConfigError, match=r"cannot be compiled on this machine \(exit code 1\).*; write format: diff"):
        compiled.compile_folder(tmp_path, 16, OutputPrecision.FP32)


def test_measured_calls_alternate_after_a_warm_up() -> None:
    calls: list[str] = []
    first, second = compile_denoiser.measure([lambda: calls.append("a"), lambda: calls.append("b")], "cpu")
    assert calls == ["a", "b"] * (len(calls) // 2) and len(calls) == 24
    assert first >= 0 and second >= 0
    assert compile_denoiser.relative_difference(torch.tensor([2.0, 4.5]), torch.tensor([2.0, 4.0])) == 0.125
