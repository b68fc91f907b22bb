"""Single files: the names of the original code, the values of diffusers' layout, and files that programs can read."""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune_contract.input_spec import ModelSpec
from finetune_contract.outputs.spec import FileContainer, OutputFormat, OutputPrecision, OutputSpec
from finetune_contract.run_spec import RunSpec
from finetune_contract.spec import TextualInversionSpec
from finetune_trainer.errors import ConfigError
from finetune_trainer.export.formats.about import About
from finetune_trainer.export.formats.write import write_format
from finetune_trainer.methods.embedding_file import find_embedding_files, read_embeddings, select_embedding
from finetune_trainer.models.base import open_base
from finetune_trainer.models.layouts.trained import TrainedControlNet, TrainedPipeline, part_of_module
from testing.trainer import tiny
from testing.trainer.methods import make_method
from tests.trainer.formats import make_keys

pytestmark = pytest.mark.trainer
FORMAT = OutputFormat.SINGLE_FILE


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny bases. diffusers tells the two text encoders of SDXL in a single file apart by their widths."""
    folder = tmp_path_factory.mktemp("bases")
    return {
        family: tiny.write_base(folder / family, family=family, second_width=2 * tiny.WIDTH) for family in tiny.FAMILIES
    }


def write(base: Path, folder: Path, **settings: object) -> Path:
    folder.mkdir(exist_ok=True)
    output = OutputSpec.model_validate({"format": FORMAT, "to": ".", **settings})
    (file,) = write_format(TrainedPipeline(open_base(ModelSpec(base=str(base))), {}), output, folder, About("tiny"))
    return file


def weights(pipeline: object) -> dict[str, Tensor]:
    parts = {name: getattr(pipeline, name, None) for name in ("unet", "vae", "text_encoder", "text_encoder_2")}
    return {
        f"{name}.{key}": value
        for name, part in parts.items()
        if part is not None
        for key, value in part.state_dict().items()
    }


@pytest.mark.parametrize("family", make_keys.FAMILIES)
def test_names_and_shapes_are_those_of_published_files(family: str) -> None:
    """1,131 tensors of SD 1.5 and 2,515 of SDXL are what their published files have. Nothing is left over."""
    expected = (make_keys.FOLDER / f"{family}.txt").read_text(encoding="utf-8").splitlines()
    assert make_keys.shapes(make_keys.original(family)) == expected
    assert len(expected) == {"sd1": 1131, "sd2": 1228, "sdxl": 2515}[family]
    expected = (make_keys.FOLDER / f"{family}-controlnet.txt").read_text(encoding="utf-8").splitlines()
    assert make_keys.shapes(make_keys.controlnet(family)) == expected


@pytest.mark.parametrize(
    ("family", "counts"),
    [
        ("sd1", {"lora_unet": 192, "lora_te": 72}),
        ("sd2", {"lora_unet": 192, "lora_te": 138}),
        ("sdxl", {"lora_unet": 722, "lora_te1": 72, "lora_te2": 192}),
    ],
)
def test_names_and_shapes_of_a_lora_are_those_of_kohyas_scripts(family: str, counts: dict[str, int]) -> None:
    """The scripts log these numbers of adapted layers; each has two matrices and an alpha."""
    expected = (make_keys.FOLDER / f"{family}-kohya.txt").read_text(encoding="utf-8").splitlines()
    assert make_keys.shapes(make_keys.kohya(family)) == expected
    layers = Counter(re.match(r"lora_(unet|te\d?)", line)[0] for line in expected)  # type: ignore[index]
    assert layers == {part: 3 * count for part, count in counts.items()}
    # The layers of SDXL's UNet have the names of the original code, those of the others the names of diffusers.
    original = (make_keys.FOLDER / f"{family}.txt").read_text(encoding="utf-8").splitlines()
    known = {line.partition(" ")[0].removesuffix(".weight") for line in original}
    known = {name.removeprefix("model.diffusion_model.").replace(".", "_") for name in known}
    adapted = {line.partition(".")[0].removeprefix("lora_unet_") for line in expected if line.startswith("lora_unet")}
    assert len(adapted & known) == (len(adapted) if family == "sdxl" else 0)


@pytest.mark.parametrize("family", make_keys.FAMILIES)
def test_every_key_of_an_embedding_is_known_and_read(family: str, tmp_path: Path) -> None:
    expected = (make_keys.FOLDER / f"{family}-embedding.txt").read_text(encoding="utf-8").splitlines()
    assert make_keys.embedding(family, tmp_path) == expected
    spec = TextualInversionSpec.model_validate({"placeholderToken": make_keys.TOKEN, "numVectors": 2})
    parts = open_base(ModelSpec(base=str(tmp_path / "base"))).load_text_encoder(torch.device("meta")).parts
    for name in make_keys.EMBEDDING_FORMATS:
        files = find_embedding_files(tmp_path / name)
        keys = [key for file in files for key in read_embeddings(file)]
        # diffusers has one file for each text encoder, and the others have one key for each.
        names = [make_keys.TOKEN] * len(parts) if name == "diffusers" else [part.webui_key for part in parts]
        assert sorted(keys) == sorted(names)
        for number, part in enumerate(parts):
            width = 1280 if number else 1024 if family == "sd2" else 768
            found = select_embedding(files, spec, part.name, number, part.webui_key, width)
            assert torch.equal(found, torch.full((2, width), float(number)))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_diffusers_reads_identical_tensors(wide: dict[str, Path], family: str, tmp_path: Path) -> None:
    file = write(wide[family], tmp_path)
    assert file.name == "tiny.safetensors"
    kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    options = {} if family == "sdxl" else {"safety_checker": None}
    found = weights(kind.from_single_file(str(file), config=str(wide[family]), torch_dtype=torch.float32, **options))
    expected = weights(DiffusionPipeline.from_pretrained(wide[family], safety_checker=None))
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def test_a_base_with_old_names_gives_the_same_file(wide: dict[str, Path], tmp_path: Path) -> None:
    """Published bases of SD 1.x name the attention of the VAE as the first releases of diffusers did."""
    old = tmp_path / "old"
    for path in wide["sd1"].rglob("*"):
        if path.is_file():
            target = old / path.relative_to(wide["sd1"])
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    vae = old / "vae/diffusion_pytorch_model.safetensors"
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = load_file(vae)
    for name in list(renamed):
        for current, before in new.items():
            if f".attentions.0.{current}." in name:
                renamed[name.replace(current, before)] = renamed.pop(name)
    save_file(renamed, vae)
    text = old / "text_encoder/model.safetensors"
    save_file({**load_file(text), "text_model.embeddings.position_ids": torch.arange(8)[None]}, text)
    assert write(old, tmp_path / "a").read_bytes() == write(wide["sd1"], tmp_path / "b").read_bytes()


def test_files_in_other_number_formats_and_containers_have_the_same_values(
    wide: dict[str, Path], tmp_path: Path
) -> None:
    expected = load_file(write(wide["sd1"], tmp_path / "a"))
    half = load_file(write(wide["sd1"], tmp_path / "b", precision=OutputPrecision.FP16))
    assert {name for name, value in half.items() if value.dtype is not torch.float16} == {
        "cond_stage_model.transformer.text_model.embeddings.position_ids"
    }
    assert all(torch.equal(half[name], value.to(half[name].dtype)) for name, value in expected.items())
    ckpt = write(wide["sd1"], tmp_path / "c", container=FileContainer.CKPT, precision=OutputPrecision.BF16)
    assert ckpt.name == "tiny.ckpt"
    state = torch.load(ckpt, weights_only=True)["state_dict"]
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value.to(state[name].dtype)) for name, value in expected.items())
    assert state["model.diffusion_model.out.2.weight"].dtype is torch.bfloat16
    # The web UIs check the archive before they read it.
    assert zipfile.ZipFile(ckpt).testzip() is None
    pipeline = StableDiffusionPipeline.from_single_file(str(ckpt), config=str(wide["sd1"]), safety_checker=None)
    assert pipeline.unet.conv_in.weight.shape == expected["model.diffusion_model.input_blocks.0.0.weight"].shape


@pytest.mark.parametrize(("family", "markers"), [("sd1", {"v_pred"}), ("sd2", set()), ("sdxl", {"v_pred", "ztsnr"})])
def test_prediction_of_v_is_marked_where_programs_cannot_find_it(
    family: str, markers: set[str], tmp_path: Path
) -> None:
    base = tiny.write_base(tmp_path / "base", "v_prediction", family)
    if "ztsnr" in markers:
        path = base / "scheduler/scheduler_config.json"
        path.write_text(path.read_text().replace("{", '{"rescale_betas_zero_snr": true, ', 1))
    with safe_open(write(base, tmp_path), framework="pt") as file:
        assert {name for name in file.keys() if name in ("v_pred", "ztsnr")} == markers  # noqa: SIM118  not a dict
        assert file.metadata()["modelspec.prediction_type"] == "v"


def test_a_base_with_unknown_tensors_is_refused(wide: dict[str, Path], tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", family="sd2")
    path = base / "text_encoder/model.safetensors"
    save_file({**load_file(path), "text_model.extra.weight": torch.ones(1)}, path)
    with pytest.raises(ConfigError, match=r"has or lacks the tensor 'text_model.extra.weight'.*format: diffusers"):
        write(base, tmp_path)


def test_diffusers_reads_a_controlnet_with_identical_tensors(bases: dict[str, Path], tmp_path: Path) -> None:
    """Of SDXL's it does not read the embedding of the sizes; the names of real ones are in the key sets."""
    family = "sd1"
    unet = UNet2DConditionModel.from_pretrained(bases[family] / "unet")
    # diffusers reads only the encoder of conditioning images for 8 pixels per latent.
    torch.manual_seed(0)
    control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 96, 256))
    trained = TrainedControlNet(open_base(ModelSpec(base=str(bases[family]))), part_of_module(control))
    (tmp_path / "one").mkdir()
    write_format(trained, OutputSpec(format=OutputFormat.DIFFUSERS, to="."), tmp_path, About("tiny"))
    comfyui = OutputSpec(format=OutputFormat.COMFYUI, to=".")
    (file,) = write_format(trained, comfyui, tmp_path / "one", About("tiny"))
    found = ControlNetModel.from_single_file(str(file), config=str(tmp_path), torch_dtype=torch.float32).state_dict()
    expected = ControlNetModel.from_pretrained(tmp_path).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    with safe_open(file, framework="pt") as tensors:
        assert tensors.metadata()["modelspec.architecture"] == "stable-diffusion-v1/controlnet"


def test_metadata_describes_the_training(bases: dict[str, Path], tmp_path: Path) -> None:
    (bases["sdxl"] / "README.md").write_text("---\nlicense: other\nlicense_name: some-licence\n---\n# A base\n")
    dreambooth = {"instancePrompt": "a photo of sks dog"}
    run = tiny.make_spec(bases["sdxl"], tmp_path, method="DreamBooth", dreambooth=dreambooth)
    method = make_method(bases["sdxl"], "DreamBooth")
    with method.trained() as trained:
        output = OutputSpec(format=FORMAT, to=".", trigger_phrase=None)
        (file,) = write_format(trained, output, tmp_path, About.of_run(RunSpec.model_validate(run), None, None, 5))
    (bases["sdxl"] / "README.md").unlink()
    with safe_open(file, framework="pt") as tensors:
        metadata = tensors.metadata()
    assert {name.removeprefix("modelspec."): value for name, value in metadata.items()} == {
        "format": "pt",
        "sai_model_spec": "1.0.1",
        "architecture": "stable-diffusion-xl-v1-base",
        "implementation": "https://github.com/Stability-AI/generative-models",
        "title": "tiny",
        "resolution": "16x16",
        "prediction_type": "epsilon",
        "description": f"DreamBooth on {bases['sdxl']}, 5 steps",
        "license": "some-licence",
        "trigger_phrase": "a photo of sks dog",
    }
