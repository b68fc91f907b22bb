"""Outputs for OpenVINO: written by optimum-intel, read by it again, and compared with torch.

`make test-export` runs these tests in an environment with the extra `export`.
"""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest

from finetune_contract.exit_codes import ExitCode
from finetune_contract.outputs.spec import OutputSpec
from tests.export.conftest import TrainedJob

pytestmark = [
    pytest.mark.trainer,
    pytest.mark.openvino,
    # The first test imports everything, and each conversion takes several seconds of one core.
    pytest.mark.timeout(1200),
    # Warnings of the tracing by torch.
    pytest.mark.filterwarnings("ignore"),
]


def write(base: Path, folder: Path, *, seed: int = 1, **settings: Any) -> Path:
    """Write an output of a complete model with random changes of the base; return its folder."""
    import torch  # noqa: PLC0415  slow to import

    from finetune_trainer.export.formats.about import About  # noqa: PLC0415
    from finetune_trainer.export.formats.write import write_format  # noqa: PLC0415
    from testing.trainer import tiny  # noqa: PLC0415
    from testing.trainer.methods import make_method  # noqa: PLC0415

    made = make_method(base, "Full")
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters().values():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    made.set_training(False)
    run = tiny.make_spec(base, folder, method="Full")
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
    optimum = importlib.import_module("optimum.intel")
    options = {"export": False, "ov_config": {"INFERENCE_PRECISION_HINT": "f32"}}
    return draw(optimum.OVDiffusionPipeline.from_pretrained(str(folder), **options), prompt)


def draw_with_torch(folder: Path, prompt: str = "sks") -> numpy.ndarray:
    from diffusers import DiffusionPipeline  # noqa: PLC0415  slow to import

    return draw(DiffusionPipeline.from_pretrained(folder), prompt)


def weights_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.bin"))


def compared(folder: Path) -> dict[str, Any]:
    """Return the stored comparison."""
    found: dict[str, Any] = json.loads((folder / "openvino-comparison.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def complete(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete model of SD 1.x in fp32."""
    return write(bases["sd1"], tmp_path_factory.mktemp("complete") / "out")


def test_a_complete_model_draws_the_pictures_of_torch(bases: dict[str, Path], complete: Path, tmp_path: Path) -> None:
    expected = draw_with_torch(write(bases["sd1"], tmp_path / "torch", format="diffusers"))
    assert numpy.abs(draw_with_openvino(complete) - expected).max() < 1e-3
    assert numpy.abs(draw_with_torch(bases["sd1"]) - expected).max() > 1e-2
    assert not list(complete.rglob("*.safetensors"))
    found = compared(complete)
    assert (found["limit"], found["prompt"], found["seed"], found["quantization"]) == (30, "a photo", 0, None)
    assert 60 < found["psnr"] <= 100
    card = (complete / "README.md").read_text(encoding="utf-8")
    assert f"a PSNR of {found['psnr']:.1f} dB beside that of torch" in card
    assert "OVDiffusionPipeline.from_pretrained(FOLDER)" in card


def test_sdxl_in_fp16_has_half_the_size(bases: dict[str, Path], tmp_path: Path) -> None:
    plain = write(bases["sdxl"], tmp_path / "torch", format="diffusers")
    written = write(bases["sdxl"], tmp_path / "openvino", precision="fp16")
    assert numpy.abs(draw_with_openvino(written) - draw_with_torch(plain)).max() < 0.05
    assert 30 < compared(written)["psnr"] < 100
    in_fp32 = sum(path.stat().st_size for path in plain.rglob("*.safetensors"))
    assert 0.4 < weights_size(written) / in_fp32 < 0.6


def test_int8_needs_less_space_and_is_less_exact(bases: dict[str, Path], complete: Path, tmp_path: Path) -> None:
    written = write(bases["sd1"], tmp_path / "int8", quantization="int8")
    assert weights_size(written) < 0.4 * weights_size(complete)
    found = compared(written)
    assert (found["limit"], found["quantization"]) == (15, "int8")
    assert 15 < found["psnr"] < compared(complete)["psnr"]
    assert draw_with_openvino(written).shape == (16, 16, 3)


def test_a_model_that_draws_another_picture_is_refused(
    bases: dict[str, Path], complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune_trainer.errors import ConfigError  # noqa: PLC0415  slow to import
    from finetune_trainer.export.formats import openvino  # noqa: PLC0415

    def convert_another(_: Path, quantization: object, folder: Path) -> None:
        assert quantization is None
        shutil.copytree(complete, folder, dirs_exist_ok=True)

    monkeypatch.setattr(openvino, "_convert", convert_another)
    with pytest.raises(ConfigError, match=r"the picture of OpenVINO has a PSNR of .* at least 30 dB is needed"):
        write(bases["sd1"], tmp_path / "out", seed=2)


def test_a_checkpoint_of_a_lora_is_merged_and_exported(
    bases: dict[str, Path], trained: TrainedJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `finetune export --format openvino` does, in one process."""
    from finetune_trainer.export.from_checkpoint import main  # noqa: PLC0415  slow to import

    outputs = [
        {"format": each, "strength": 0.5, "to": str(tmp_path / "outputs" / each)} for each in ("openvino", "merged")
    ]
    (checkpoint,) = (trained.job_dir / "checkpoints").glob("step-00000002-*")
    arguments = [trained.run, checkpoint, json.dumps(outputs), tmp_path / "records", trained.cache]
    assert main([str(each) for each in arguments]) == ExitCode.DONE
    written = [json.loads(line)["format"] for line in capsys.readouterr().out.splitlines()]
    assert written == ["openvino", "merged"]
    expected = draw_with_torch(tmp_path / "outputs/merged")
    assert numpy.abs(draw_with_openvino(tmp_path / "outputs/openvino") - expected).max() < 1e-3
    assert numpy.abs(draw_with_torch(bases["sd1"]) - expected).max() > 1e-2
    card = (tmp_path / "outputs/openvino/README.md").read_text(encoding="utf-8")
    assert "A complete model with a merged LoRA" in card
