"""Single-file bases: they have the weights of the folder that they were written from; other content is refused."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file

from finetune_contract.input_spec import ModelSpec
from finetune_trainer.errors import ConfigError
from finetune_trainer.models.base import open_base
from testing.trainer import tiny
from testing.trainer.ranks import Ranks
from testing.trainer.single_file import to_original
from tests.trainer.checkpoint.test_sharding import done

pytestmark = pytest.mark.trainer


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_single_file_has_the_weights_of_its_folder(
    base: Path, tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    file = tmp_path / f"model{suffix}"
    known = {"model_ema.decay": torch.zeros(()), "betas": torch.zeros(1)}
    state = {**to_original(pipeline), **known, **{f"lora_te_{number}": torch.zeros(1) for number in range(4)}}
    if suffix == ".ckpt":
        torch.save({"state_dict": state}, file)
    else:
        save_file(state, file)
    spec = ModelSpec(base=str(file), config=str(base))
    family = open_base(spec, tmp_path / "cache")
    for name, value in family.load_denoiser(torch.float32).state_dict().items():
        assert torch.equal(value, pipeline.unet.state_dict()[name]), name
    encoder = family.load_image_encoder(torch.device("cpu"))
    pixels = torch.rand(1, 3, 16, 16)
    expected = open_base(ModelSpec(base=str(base))).load_image_encoder(torch.device("cpu")).encode(pixels)
    torch.testing.assert_close(encoder.encode(pixels), expected)
    assert len(list((tmp_path / "cache" / "bases").iterdir())) == 1
    assert open_base(spec, tmp_path / "cache").denoiser_files() == family.denoiser_files()
    unused = "contains 4 tensors of no part of the model (lora_te_0, lora_te_1, lora_te_2, ...); they are not used"
    assert [each for each in caplog.messages if "not used" in each] == [f"model.base: {file} {unused}"]


@pytest.mark.parametrize(("mask", "expected"), [(0o002, 0o664), (0o077, 0o600)])
def test_converted_base_has_the_permissions_of_other_files(
    mask: int, expected: int, base: Path, tmp_path: Path
) -> None:
    """Pods that run as other users of the same group read the shared cache."""
    file = tmp_path / "model.safetensors"
    save_file(to_original(StableDiffusionPipeline.from_pretrained(base, safety_checker=None)), file)
    before = os.umask(mask)
    try:
        open_base(ModelSpec(base=str(file), config=str(base)), tmp_path / "cache")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "cache" / "bases").rglob("*") if path.is_file()}
    assert modes == {expected}


@pytest.fixture(scope="module")
def xl_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SDXL whose text encoders have different widths, by which diffusers distinguishes them."""
    return tiny.write_base(tmp_path_factory.mktemp("xl") / "base", family="sdxl", second_width=2 * tiny.WIDTH)


def test_single_file_of_sdxl_trains_the_same_weights_as_its_folder(xl_base: Path, data: Path, tmp_path: Path) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(xl_base)
    file = tmp_path / "model.safetensors"
    save_file(to_original(pipeline), file)
    spec = tiny.make_spec(xl_base, data, steps=1)
    single = spec.model_copy(update={"model": ModelSpec(base=str(file), config=str(xl_base))})
    family = open_base(single.model, tmp_path / "cache")
    assert type(family) is type(open_base(spec.model))
    for name, value in family.load_denoiser(torch.float32).state_dict().items():
        assert torch.equal(value, pipeline.unet.state_dict()[name]), name
    trained = [done(Ranks(each, tmp_path / name / "job")) for name, each in (("single", single), ("folder", spec))]
    assert trained[0].weights() == trained[1].weights()


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("run",)


def test_pickle_with_more_than_weights_is_refused_and_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"x": torch.zeros(1)}, "more": _Bomb()}, file)
    with pytest.raises(ConfigError, match=r"model\.base: .*model\.ckpt contains more than weights"):
        open_base(ModelSpec(base=str(file)), tmp_path / "cache")
    assert capsys.readouterr().out == ""
    file.write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(ConfigError, match=r"model\.base: .*model\.ckpt"):
        open_base(ModelSpec(base=str(file)), tmp_path / "cache")
    assert capsys.readouterr().out == ""


def test_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x10" * 100)
    with pytest.raises(ConfigError, match=r"model\.base: .*model\.safetensors is not a readable checkpoint"):
        open_base(ModelSpec(base=str(tmp_path / "model.safetensors")), tmp_path / "cache")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (torch.zeros(2, 2), "a single tensor"),
        ({"state_dict": torch.zeros(2)}, "a single tensor"),
        ([torch.zeros(2)], "a list"),
        ({"epoch": 3}, "no tensors"),
        ({"state_dict": {}}, "no tensors"),
    ],
    ids=["tensor", "tensor as state_dict", "list", "numbers", "empty"],
)
def test_checkpoint_without_named_weights_is_refused(content: Any, found: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(
        ConfigError, match=rf"model\.base: .*model\.ckpt contains {found} instead of named weights; write"
    ):
        open_base(ModelSpec(base=str(tmp_path / "model.ckpt")), tmp_path / "cache")


_UNET, _VAE, _TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (_UNET, rf"lacks the denoiser: no tensor has a name like {_UNET}\.\.\."),
        (_VAE, rf"lacks the VAE: no tensor has a name like {_VAE}\.\.\."),
        (_TEXT, rf"lacks the text encoder: no tensor has a name like {_TEXT}\.\.\."),
        (
            f"{_UNET}input_blocks.1.",
            r"lacks the tensors for UNet2DConditionModel\.down_.*, .*, .* and \d+ more",
        ),
        (
            f"{_VAE}encoder.conv_in.",
            r"lacks the tensors for AutoencoderKL\.encoder\.conv_in\.weight, ",
        ),
        (
            f"{_TEXT}transformer.text_model.final",
            r"lacks the tensors for text_encoder\.(text_model\.)?final_layer",
        ),
    ],
)
def test_a_file_without_some_tensors_is_refused_by_their_names(
    base: Path, tmp_path: Path, start: str, message: str
) -> None:
    state = to_original(StableDiffusionPipeline.from_pretrained(base, safety_checker=None))
    file = tmp_path / "model.safetensors"
    save_file({name: value for name, value in state.items() if not name.startswith(start)}, file)
    with pytest.raises(ConfigError, match=rf"^model\.base: {file} {message}.*; write a complete checkpoint of a base"):
        open_base(ModelSpec(base=str(file), config=str(base)), tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*")), "nothing is kept"


def test_a_file_for_another_configuration_is_refused(base: Path, tmp_path: Path) -> None:
    state = to_original(StableDiffusionPipeline.from_pretrained(base, safety_checker=None))
    file = tmp_path / "model.safetensors"
    save_file(state | {f"{_UNET}input_blocks.0.0.bias": torch.ones(320)}, file)
    message = r"has tensors of another shape than its configuration: conv_in\.bias expected shape .*; write the folder"
    with pytest.raises(ConfigError, match=rf"^model\.base: {file} {message} or hub id of the configuration"):
        open_base(ModelSpec(base=str(file), config=str(base)), tmp_path / "cache")
