"""Pictures of everything that a job writes equal those that diffusers draws with the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from finetune_contract.input_spec import ModelSpec
from finetune_contract.outputs.generation import DrawingDevice, GenerateRequest
from finetune_contract.outputs.spec import OutputFormat, OutputPrecision, OutputSpec
from finetune_trainer.errors import ConfigError
from finetune_trainer.export.formats.about import About
from finetune_trainer.export.formats.write import write_format
from finetune_trainer.generate.columns import check
from finetune_trainer.generate.found import FoundModel, Kind, find
from finetune_trainer.generate.grid import build_grid
from finetune_trainer.generate.main import draw, generate
from finetune_trainer.generate.openvino import precision_hint
from finetune_trainer.generate.origin import Origin, read_origin
from testing.trainer import tiny
from testing.trainer.methods import SETTINGS, make_method

pytestmark = pytest.mark.trainer
PROMPT = "cat"
OPTIONS: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 7.5, "width": 16, "height": 16}
TOLERANCE = 2
"""Largest difference of a value of 255: another order of the same sums can round one value differently."""


def write(bases: dict[str, Path], name: str, output: str, folder: Path, family: str, **settings: Any) -> Path:
    """Write an output of a method with random weights, as the job `tiny`."""
    method = make_method(bases[family], name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in method.parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    folder.mkdir(parents=True)
    run = tiny.make_spec(bases[family], folder, **SETTINGS[name])
    with method.trained() as trained:
        write_format(
            trained, OutputSpec(format=OutputFormat(output), to=".", **settings), folder, About("tiny", run, 6)
        )
    return folder


def draw_columns(model: Path, folder: Path, **options: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Return the first picture of each column, by its label."""
    request = GenerateRequest(
        model=str(model), grid="grid.png", **{"prompts": (PROMPT,), "seeds": (3,), "steps": 2, **options}
    )
    result, pictures = draw(request, folder / "cache")
    return {column.label: np.asarray(images[0]) for column, images in zip(result.columns, pictures, strict=True)}


def expect(pipeline: Any, prompt: str = PROMPT, **options: Any) -> np.ndarray[Any, Any]:
    """Return the picture that a pipeline of diffusers draws."""
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(prompt, generator=torch.Generator().manual_seed(3), **{**OPTIONS, **options}).images
    return np.asarray(pictures[0])


def assert_near(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= TOLERANCE


def load(base: Path, kind: str = "StableDiffusionPipeline", **parts: Any) -> Any:
    return getattr(diffusers, kind).from_pretrained(base, **parts)


@pytest.mark.parametrize(("name", "output", "family"), [("LoRA, text", "diffusers", "sd1"), ("LoRA", "kohya", "sdxl")])
def test_strengths_of_a_lora(bases: dict[str, Path], tmp_path: Path, name: str, output: str, family: str) -> None:
    """Its base is named in the output. DoRA at half strength is what the format `merged` writes."""
    folder = write(bases, name, output, tmp_path / "model", family)
    found = draw_columns(folder, tmp_path, compare_base=True, strengths=(1, 0.5, 0))
    assert list(found) == ["base", "strength 1", "strength 0.5", "strength 0"]
    assert (found["strength 0"] == found["base"]).all()
    pipeline = load(bases[family], f"StableDiffusion{'XL' if family == 'sdxl' else ''}Pipeline")
    assert_near(found["base"], expect(pipeline))
    pipeline.load_lora_weights(folder)
    assert_near(found["strength 1"], expect(pipeline))
    assert np.abs(found["strength 1"].astype(int) - found["base"].astype(int)).max() > 8 * TOLERANCE
    if family == "sd1":
        merged = write(bases, name, "merged", tmp_path / "merged", family, strength=0.5)
        assert_near(found["strength 0.5"], expect(load(merged)))


def test_a_complete_model_next_to_its_base(bases: dict[str, Path], tmp_path: Path) -> None:
    """A single file is read with the configuration of its base, without the hub."""
    folder = write(bases, "Full", "diffusers", tmp_path / "model", "sd1")
    file = write(bases, "Full", "single-file", tmp_path / "file", "sd1")
    found = draw_columns(folder, tmp_path, compare_base=True)
    assert_near(found["base"], expect(load(bases["sd1"])))
    assert_near(found["model"], expect(load(folder)))
    (of_file,) = draw_columns(file, tmp_path, name="tiny").values()
    assert_near(of_file, found["model"])


@pytest.mark.parametrize(("output", "family", "full"), [("single-file", "sdxl", False), ("diffusers", "sd1", True)])
def test_a_controlnet_follows_its_picture(
    bases: dict[str, Path], tmp_path: Path, output: str, family: str, full: bool
) -> None:
    edges = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    edges.save(tmp_path / "edge.png")
    folder = write(bases, "ControlNet", output, tmp_path / "model", family, full=full)
    found = draw_columns(folder, tmp_path, condition=str(tmp_path / "edge.png"), strengths=(0, 1), compare_base=True)
    assert_near(found["strength 0"], found["base"])
    part = folder / "controlnet"
    if not full:
        part = write(bases, "ControlNet", "diffusers", tmp_path / "part", family)
    controlnet = diffusers.ControlNetModel.from_pretrained(part)
    kind = f"StableDiffusion{'XL' if family == 'sdxl' else ''}ControlNetPipeline"
    assert_near(found["strength 1"], expect(load(bases[family], kind, controlnet=controlnet), image=edges))
    assert np.abs(found["strength 1"].astype(int) - found["base"].astype(int)).max() > 8 * TOLERANCE


def test_an_embedding_of_the_web_uis_has_two_words(
    bases: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The name of the file, as in the web UIs, and the word of the training."""
    folder = write(bases, "TextualInversion", "webui", tmp_path / "model", "sdxl")
    of_diffusers = write(bases, "TextualInversion", "diffusers", tmp_path / "part", "sdxl")
    pipeline = load(bases["sdxl"], "StableDiffusionXLPipeline")
    without = expect(pipeline, "<cat>")
    for number in ("", "_2"):
        pipeline.load_textual_inversion(
            of_diffusers / f"learned_embeds{number}.safetensors",
            text_encoder=getattr(pipeline, f"text_encoder{number}"),
            tokenizer=getattr(pipeline, f"tokenizer{number}"),
        )
    expected = expect(pipeline, "<cat>")
    for path, words in ((folder, ("<cat>", "tiny")), (of_diffusers, ("<cat>",))):
        _, (pictures,) = draw(
            GenerateRequest(model=str(path), grid="grid.png", prompts=words, seeds=(3,), steps=2), tmp_path / "cache"
        )
        for picture in pictures:
            assert_near(np.asarray(picture), expected)
    assert np.abs(without.astype(int) - expected.astype(int)).max() > 8 * TOLERANCE
    assert "no prompt contains" not in caplog.text
    draw_columns(of_diffusers, tmp_path)
    assert "no prompt contains <cat>" in caplog.text


def test_the_grid_has_a_row_per_prompt_and_seed(bases: dict[str, Path], tmp_path: Path) -> None:
    """Equal requests give equal files."""
    folder = write(bases, "LoRA", "diffusers", tmp_path / "model", "sd1")
    (tmp_path / "edge").mkdir()
    for name in ("one.png", "two.png"):
        request = GenerateRequest(
            model=str(folder), grid=str(tmp_path / name), prompts=("a", "b"), seeds=(1, 2), steps=1, width=24, height=16
        )
        result = generate(request, tmp_path / "cache")
        assert [len(column.seconds) for column in result.columns] == [4]
        assert (result.width, result.height, result.device) == (24, 16, "cpu, float32")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    with Image.open(tmp_path / "one.png") as grid:
        rows = [np.asarray(grid.crop((230, 32 + number * 108, 350, 120 + number * 108))) for number in range(4)]
    assert all((one != other).any() for number, one in enumerate(rows) for other in rows[:number])


def test_labels_are_wrapped_and_pictures_keep_their_pixels() -> None:
    colours = ["red", "lime", "blue", "white"]
    pictures = [Image.new("RGB", (64, 32), colour) for colour in colours]
    grid = build_grid(["one", "two"], ["short", "x" * 400], [pictures[:2], pictures[2:]])
    assert grid.width == 220 + 2 * (128 + 12)
    assert grid.height > 12 + 20 + 2 * (64 + 12), "the long label needs more lines than the picture"
    assert grid.getpixel((220, 40)) == (255, 0, 0)
    assert grid.getpixel((220 + 140, 40)) == (0, 0, 255)
    assert grid.getpixel((220, 32 + 76 + 8)) == (0, 255, 0)


def write_tensors(
    path: Path, names: list[str], shape: tuple[int, ...] = (2, 2), metadata: dict[str, str] | None = None
) -> Path:
    from safetensors.torch import save_file  # noqa: PLC0415  only here

    save_file({name: torch.zeros(shape) for name in names}, path, metadata)
    return path


def test_what_a_path_contains(tmp_path: Path) -> None:
    names = {
        Kind.SINGLE_FILE: "model.diffusion_model.out.0.weight",
        Kind.LORA: "lora_unet_mid_block.lora_down.weight",
        Kind.CONTROLNET: "control_model.input_hint_block.0.weight",
        Kind.EMBEDDING: "emb_params",
    }
    for kind, name in names.items():
        path = write_tensors(tmp_path / f"{kind.name}.safetensors", [name])
        assert find(path) == FoundModel(kind, path)
    assert find(tmp_path, "LORA").kind is Kind.LORA
    (tmp_path / "old.ckpt").write_bytes(b"")
    assert find(tmp_path / "old.ckpt").kind is Kind.SINGLE_FILE
    with pytest.raises(ConfigError, match=r"--model: .* contains 5 models \(CONTROLNET.*; write the path of one"):
        find(tmp_path)
    other = write_tensors(tmp_path / "vae.safetensors", ["decoder.conv_in.weight"], (2, 2, 2))
    with pytest.raises(ConfigError, match=r"neither a complete model nor a LoRA.*; for a part of a pipeline, write"):
        find(other)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"--model: .*empty contains neither a pipeline .*; write the path of an out"):
        find(tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"--model: .*gone does not exist; write the path of a folder or file"):
        find(tmp_path / "gone")
    (tmp_path / "x.safetensors").write_bytes(b"\1")
    with pytest.raises(ConfigError, match=r"--model: .*x.safetensors cannot be read .*; write a complete"):
        find(tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match=r"is no model; write a .safetensors or .ckpt file"):
        find(Path(__file__))


def test_what_an_output_says_about_its_base(tmp_path: Path) -> None:
    described = write_tensors(
        tmp_path / "a.safetensors",
        ["emb_params"],
        metadata={
            "modelspec.description": "TextualInversion on /models/a, b, 20 steps",
            "modelspec.resolution": "768x768",
        },
    )
    assert read_origin(described) == Origin(ModelSpec(base="/models/a, b"), 768)
    kohya = write_tensors(
        tmp_path / "b.safetensors", ["a"], metadata={"ss_sd_model_name": "me/base", "ss_clip_skip": "1"}
    )
    assert read_origin(kohya) == Origin(ModelSpec(base="me/base"), None, 1)
    (tmp_path / "README.md").write_text('---\nbase_model: "org/name"\n---\n')
    assert read_origin(tmp_path) == Origin(ModelSpec(base="org/name"))
    assert read_origin(kohya).base == ModelSpec(base="me/base")


BASE = ModelSpec(base="/base")


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    [
        (Kind.PIPELINE, {"strengths": (0.5,)}, "--strength: model is a pipeline, and only a LoRA and a ControlNet"),
        (Kind.LORA, {"condition": "edge.png", "base": BASE}, "--condition: model is a LoRA.*; leave --condition out"),
        (Kind.CONTROLNET, {"base": BASE}, "--condition: model is a ControlNet.*; write its path as --condition"),
        (Kind.LORA, {}, "--base: model is a LoRA, and nothing .* names its base; write --base with"),
        (Kind.SINGLE_FILE, {"compare_base": True}, "--base: model is a complete model.*; write --base with"),
    ],
)
def test_flags_that_do_not_fit_are_refused_before_anything_is_loaded(
    kind: Kind, flags: dict[str, Any], message: str
) -> None:
    request = GenerateRequest(model="model", grid="grid.png", prompts=("a",), **flags)
    with pytest.raises(ConfigError, match=message):
        check(request, FoundModel(kind, Path("model")), Origin())


def test_bad_values_are_refused_with_their_flag(base: Path, tmp_path: Path) -> None:
    good = {"model": str(base), "grid": str(tmp_path / "grid.png"), "prompts": ("a",)}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"width": 100, "height": 100}, "--size: 100 is not a multiple of 8; write e.g. 104"),
        ({"grid": str(tmp_path / "gone" / "grid.png")}, "--grid: the folder .* does not exist; create it"),
        ({"grid": str(tmp_path / "grid.text")}, "--grid: .* has no suffix of an image format; write e.g. grid.png"),
        ({"condition": str(tmp_path / "gone.png")}, "--condition: .* does not exist; write the path of a picture"),
        ({"seeds": tuple(range(401))}, "--prompt: 401 pictures do not fit into a grid of 400; write fewer"),
        ({"base": ModelSpec(base="/gone"), "compare_base": True}, "--base: the folder /gone does not exist"),
    ]
    if not torch.cuda.is_available():
        cases.append(({"device": "gpu"}, "--device: torch finds no GPU on this machine; write --device cpu"))
    for changes, message in cases:
        with pytest.raises(ConfigError, match=message):
            generate(GenerateRequest.model_validate({**good, **changes}), tmp_path / "cache")


def test_another_base_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "edge.png")
    for name, options in (("LoRA", {}), ("ControlNet", {"condition": str(tmp_path / "edge.png")})):
        folder = write(bases, name, "single-file" if name == "ControlNet" else "kohya", tmp_path / name, "sd1")
        with pytest.raises(ConfigError, match=r"--model: .*(this kind of base|own base in --base|same kind of base)"):
            draw_columns(folder, tmp_path, base=ModelSpec(base=str(bases["sdxl"])), **options)


def test_an_openvino_folder_needs_its_package(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optimum.intel", None)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "openvino_model.xml").touch()
    (tmp_path / "model_index.json").write_text("{}")
    assert find(tmp_path).kind is Kind.OPENVINO
    with pytest.raises(ConfigError, match=r"optimum-intel, .* is not installed; install it with: pip install"):
        draw_columns(tmp_path, tmp_path)


def test_openvino_computes_in_the_number_format_of_the_flag() -> None:
    hint = "INFERENCE_PRECISION_HINT"
    assert precision_hint(DrawingDevice.AUTO, None) == precision_hint(DrawingDevice.CPU, None) == {hint: "f32"}
    assert precision_hint(DrawingDevice.GPU, None) == {}
    assert precision_hint(DrawingDevice.GPU, OutputPrecision.FP16) == {hint: "f16"}
    assert precision_hint(DrawingDevice.CPU, OutputPrecision.BF16) == {hint: "bf16"}
