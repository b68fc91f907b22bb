"""The checks of the readers notice each fault that they are for; `make test-readers` runs them on all outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune_contract.methods import METHODS
from finetune_contract.outputs.spec import OutputFormat
from finetune_trainer.data.sampling.draws import Draws, Purpose
from finetune_trainer.data.sampling.order import SampleRef
from testing.trainer.methods import export, make_method
from testing.trainer.single_file import to_original
from tests.readers import read, write
from tests.readers.cases import Case

Change = Callable[[dict[str, Tensor]], None]
UP = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight"


def rename(name: str, new: str) -> Change:
    return lambda tensors: tensors.update({new: tensors.pop(name)})


@pytest.fixture(scope="module")
def original(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("original") / "base.safetensors"
    save_file(to_original(DiffusionPipeline.from_pretrained(base, safety_checker=None)), file)
    return file


def make_case(base: Path, original: Path, output: OutputFormat, folder: Path) -> Case:
    """Return a case for a LoRA; its picture is that of the reader, which the tests then change."""
    method = make_method(base, "LoRA", lora={"rank": 2, "alpha": 6, "useDora": output is OutputFormat.KOHYA})
    torch.manual_seed(0)
    for parameter in method.parameters().values():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    target = folder / "output"
    target.mkdir()
    export(method, output, target)
    noise = Draws(0).normal(Purpose.PICTURE, SampleRef(0, 0), (1, 4, 8, 8))
    save_file({"noise": noise}, folder / "noise")
    paths = {"picture": folder / "picture.png", "noise": folder / "noise"}
    paths |= {"base": base, "original": original, "output": target}
    case = Case(
        name="LoRA",
        family="sd1",
        kind="kohya" if output is OutputFormat.KOHYA else "lora",
        prompt="word",
        token="",
        condition="",
        **{name: str(path) for name, path in paths.items()},
    )
    picture = read.draw(case, read.READERS[case.kind][0](case))
    Image.fromarray(picture.round().astype(np.uint8)).save(case.picture)
    return case


def change_file(case: Case, change: Change) -> None:
    (file,) = Path(case.output).glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_intact_lora_is_read_and_another_picture_is_noticed(base: Path, original: Path, tmp_path: Path) -> None:
    case = make_case(base, original, OutputFormat.DIFFUSERS, tmp_path)
    assert read.read(case) <= 0.51
    change_file(case, lambda tensors: tensors.update({UP: tensors[UP] * 3}))
    with pytest.raises(ValueError, match=r"the picture differs from the trainer's by \d+\.\d\d of 255"):
        read.read(case)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop(UP),
        rename(UP, UP.replace("down_blocks.1", "down_blocks.7")),
        lambda tensors: tensors.update({UP.replace("to_q", "to_w"): tensors[UP] + 1}),
    ],
    ids=["missing", "renamed", "unknown"],
)
def test_lora_that_is_not_read_completely_is_noticed(
    change: Change, base: Path, original: Path, tmp_path: Path
) -> None:
    case = make_case(base, original, OutputFormat.DIFFUSERS, tmp_path)
    change_file(case, change)
    with pytest.raises((ValueError, KeyError, RuntimeError)):
        read.read_lora(case)


KOHYA = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.update({f"{KOHYA}.dora_scale": tensors[f"{KOHYA}.dora_scale"].flatten()}),
            r"to_q\.dora_scale has the shape \(16,\) instead of \(16, 1\)",
        ),
        (lambda tensors: tensors.update({"lora_unet_x.alpha": torch.ones(())}), r"no layer is named lora_unet_x"),
        (lambda tensors: tensors.pop(f"{KOHYA}.alpha"), r"to_q has dora_scale, lora_down\.weight, lora_up\.weight"),
    ],
    ids=["shape", "name", "alpha"],
)
def test_kohya_file_that_web_uis_would_read_wrongly_is_noticed(
    change: Change, message: str, base: Path, original: Path, tmp_path: Path
) -> None:
    case = make_case(base, original, OutputFormat.KOHYA, tmp_path)
    assert read.read(case) <= 0.51
    change_file(case, change)
    with pytest.raises(ValueError, match=message):
        read.read_webui(case)


def test_part_of_a_pipeline_with_other_names_is_noticed(base: Path, tmp_path: Path) -> None:
    UNet2DConditionModel.from_pretrained(base / "unet").save_pretrained(tmp_path)
    read.check_names(UNet2DConditionModel, tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["other.weight"] = tensors.pop("conv_in.weight")
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"missing_keys': \['conv_in.weight'\], 'unexpected_keys': \['other.weight'\]"):
        read.check_names(UNet2DConditionModel, tmp_path)


def test_single_file_with_another_name_is_noticed(base: Path, original: Path, tmp_path: Path) -> None:
    assert read.check_original(str(original), str(base)) == 0
    file = tmp_path / "base.safetensors"
    tensors = load_file(original)
    tensors["model.diffusion_model.input_blocks.0.0.weight"] += 1
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"unet\.conv_in\.weight differs from that of base"):
        read.check_original(str(file), str(base))


def test_every_format_of_every_method_has_a_reader() -> None:
    written = {
        (method, output) for method, traits in METHODS.items() for output in traits.formats - write.OTHER_FORMATS
    }
    assert set(write.KINDS) == written
    assert {*write.KINDS.values(), write.FULL_CONTROLNET} == set(read.READERS)
