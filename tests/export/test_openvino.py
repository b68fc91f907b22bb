"""Outputs for OpenVINO: written by optimum-intel, read by it again, and compared with torch.

`make test-export` runs these tests in an environment with the extra `export`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest

from finetune_contract.exit_codes import ExitCode
from finetune_contract.outputs.spec import OutputSpec

pytestmark = [pytest.mark.trainer, pytest.mark.openvino]


def write(base: Path, folder: Path, method: str = "Full", **settings: Any) -> Path:
    """Write an output of a method with random changes of its weights; return its folder."""
    import torch  # noqa: PLC0415  slow to import

    from finetune_trainer.export.formats.about import About  # noqa: PLC0415
    from finetune_trainer.export.formats.write import write_format  # noqa: PLC0415
    from testing.trainer import tiny  # noqa: PLC0415
    from testing.trainer.methods import SETTINGS, make_method  # noqa: PLC0415

    made = make_method(base, method)
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters().values():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    made.set_training(False)
    run = tiny.make_spec(base, folder, **SETTINGS[method])
    folder.mkdir()
    with made.trained() as trained:
        output = OutputSpec.model_validate({"format": "openvino", "to": ".", **settings})
        files = write_format(trained, output, folder, About("tiny", run, 6))
    assert sorted(files) == sorted(path for path in folder.rglob("*") if path.is_file())
    return folder


def draw(pipeline: Any, prompt: str) -> numpy.ndarray:
    import torch  # noqa: PLC0415  slow to import

    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    drawn = pipeline(prompt, num_inference_steps=3, generator=generator, output_type="np", width=16, height=16)
    picture: numpy.ndarray = drawn.images[0]
    return picture


def draw_with_openvino(folder: Path, prompt: str = "sks") -> numpy.ndarray:
    from optimum.intel import OVDiffusionPipeline  # noqa: PLC0415  slow to import

    options = {"export": False, "ov_config": {"INFERENCE_PRECISION_HINT": "f32"}}
    return draw(OVDiffusionPipeline.from_pretrained(str(folder), **options), prompt)


def draw_with_torch(folder: Path, prompt: str = "sks") -> numpy.ndarray:
    from diffusers import DiffusionPipeline  # noqa: PLC0415  slow to import

    return draw(DiffusionPipeline.from_pretrained(folder), prompt)


def weights_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.bin"))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_complete_model_draws_the_pictures_of_torch(bases: dict[str, Path], family: str, tmp_path: Path) -> None:
    plain = write(bases[family], tmp_path / "torch", format="diffusers")
    written = write(bases[family], tmp_path / "openvino")
    expected = draw_with_torch(plain)
    assert numpy.abs(draw_with_openvino(written) - expected).max() < 1e-3
    assert numpy.abs(draw_with_torch(bases[family]) - expected).max() > 1e-2
    assert not list(written.rglob("*.safetensors"))
    found = json.loads((written / "openvino-comparison.json").read_text(encoding="utf-8"))
    assert (found["limit"], found["prompt"], found["seed"], found["quantization"]) == (30, "a photo", 0, None)
    assert 60 < found["psnr"] <= 100
    card = (written / "README.md").read_text(encoding="utf-8")
    assert f"a PSNR of {found['psnr']:.1f} dB beside that of torch" in card
    assert "OVDiffusionPipeline.from_pretrained(FOLDER)" in card


def test_a_lora_is_merged_into_its_base(bases: dict[str, Path], tmp_path: Path) -> None:
    merged = write(bases["sd1"], tmp_path / "torch", "LoRA", format="merged", strength=0.5)
    written = write(bases["sd1"], tmp_path / "openvino", "LoRA", strength=0.5)
    expected = draw_with_torch(merged)
    assert numpy.abs(draw_with_openvino(written) - expected).max() < 1e-3
    assert numpy.abs(draw_with_torch(bases["sd1"]) - expected).max() > 1e-2
    assert "A complete model with a merged LoRA" in (written / "README.md").read_text(encoding="utf-8")


def test_the_precision_and_the_quantization_decide_the_size_of_the_weights(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    sizes, ratios = {}, {}
    for name, settings in {"fp32": {}, "fp16": {"precision": "fp16"}, "int8": {"quantization": "int8"}}.items():
        folder = write(bases["sd1"], tmp_path / name, **settings)
        sizes[name] = weights_size(folder)
        ratios[name] = json.loads((folder / "openvino-comparison.json").read_text(encoding="utf-8"))["psnr"]
        assert draw_with_openvino(folder).shape == (16, 16, 3)
    assert 0.45 < sizes["fp16"] / sizes["fp32"] < 0.6
    assert sizes["int8"] < 0.9 * sizes["fp32"]
    assert ratios["int8"] < ratios["fp32"]


def test_a_model_that_draws_another_picture_is_refused(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune_trainer.errors import ConfigError  # noqa: PLC0415  slow to import
    from finetune_trainer.export.formats import openvino  # noqa: PLC0415

    convert = openvino._convert
    monkeypatch.setattr(openvino, "_convert", lambda _, *rest: convert(bases["sd1"], *rest))
    with pytest.raises(
        ConfigError, match=r"outputs: the picture of OpenVINO has a PSNR of .* at least 30 dB is needed"
    ):
        write(bases["sd1"], tmp_path / "out")


def test_a_checkpoint_is_exported(bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As `finetune export --format openvino` does, in one process."""
    from finetune_trainer.export.from_checkpoint import main  # noqa: PLC0415  slow to import
    from finetune_trainer.report import Reporter  # noqa: PLC0415
    from finetune_trainer.train.context import RankContext  # noqa: PLC0415
    from finetune_trainer.train.preemption_notice import PreemptionNotice  # noqa: PLC0415
    from finetune_trainer.train.run import run_rank  # noqa: PLC0415
    from testing.trainer import tiny  # noqa: PLC0415

    data = tiny.write_data(tmp_path / "data")
    spec = tiny.make_spec(bases["sd1"], data, steps=2)
    job_dir, cache = tmp_path / "job", tmp_path / "cache"
    context = RankContext(spec, 1, job_dir, cache, PreemptionNotice(), Reporter(0, None))
    assert run_rank(context, {"OMP_NUM_THREADS": "1"}) is ExitCode.DONE
    (checkpoint,) = (job_dir / "checkpoints").glob("step-00000002-*")
    (tmp_path / "run.json").write_text(spec.to_json(), encoding="utf-8")
    outputs = json.dumps([{"format": "openvino", "to": str(tmp_path / "out")}])
    arguments = [str(tmp_path / "run.json"), str(checkpoint), outputs, str(tmp_path / "records"), str(cache)]
    capsys.readouterr()
    assert main(arguments) == ExitCode.DONE
    assert json.loads(capsys.readouterr().out)["format"] == "openvino"
    assert numpy.isfinite(draw_with_openvino(tmp_path / "out")).all()
