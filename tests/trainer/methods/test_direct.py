"""The denoiser that is mapped from its files: equal to that of diffusers, with fallbacks, and loaded in a thread."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune_contract.input_spec import ModelSpec
from finetune_trainer.checkpoint.store import base as store_module
from finetune_trainer.models import parts, stable_diffusion, unet
from finetune_trainer.models.base import open_base
from finetune_trainer.models.direct import DirectFamily, EarlyDenoiser, read_module

pytestmark = pytest.mark.trainer

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def read(base: Path, dtype: torch.dtype = torch.float32, proceed: Callable[[], bool] = lambda: True) -> Any:
    family = open_base(ModelSpec(base=str(base)))
    assert isinstance(family, DirectFamily)
    return family.read_denoiser(dtype, CPU, proceed)


def assert_equal(found: Any, expected: Any) -> None:
    weights = expected.state_dict()
    assert list(found.state_dict()) == list(weights)
    assert [name for name, _ in found.named_parameters()] == [name for name, _ in expected.named_parameters()]
    for name, value in found.state_dict().items():
        assert value.dtype == weights[name].dtype
        assert torch.equal(value, weights[name]), name
    assert dict(found.config) == dict(expected.config)
    assert found.training == expected.training
    assert {each.requires_grad for each in found.parameters()} == {True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_it_equals_what_diffusers_loads(base: Path, tmp_path: Path, dtype: torch.dtype, stored: torch.dtype) -> None:
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    weights = copy / "unet" / WEIGHTS
    save_file({name: value.to(stored) for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    assert_equal(read(copy, dtype), open_base(ModelSpec(base=str(copy))).load_denoiser(dtype))


def test_weights_of_the_same_format_are_mapped_not_copied(base: Path) -> None:
    module = read(base)
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if f"unet/{WEIGHTS}" in line]
    ranges = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in mapped]
    for value in module.parameters():
        assert any(first <= value.data_ptr() < last for first, last in ranges)


def test_numbered_files_are_read(base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    unet = copy / "unet"
    tensors = load_file(unet / WEIGHTS)
    (unet / WEIGHTS).unlink()
    names = sorted(tensors)
    parts = {f"diffusion_pytorch_model-0000{number}-of-00002.safetensors": names[number - 1 :: 2] for number in (1, 2)}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, unet / file, {"format": "pt"})
    weight_map = {name: file for file, own in parts.items() for name in own}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (unet / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    assert_equal(read(copy), open_base(ModelSpec(base=str(copy))).load_denoiser(torch.float32))


def _without(tensors: dict[str, Any]) -> dict[str, Any]:
    tensors.pop("conv_in.bias")
    return tensors


def _with(tensors: dict[str, Any]) -> dict[str, Any]:
    return tensors | {"other": torch.zeros(1)}


def _reshaped(tensors: dict[str, Any]) -> dict[str, Any]:
    return tensors | {"conv_in.bias": torch.zeros(3)}


@pytest.mark.parametrize("change", [_without, _with, _reshaped])
def test_files_with_other_tensors_are_left_to_diffusers(
    base: Path, tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    weights = copy / "unet" / WEIGHTS
    save_file(change(load_file(weights)), weights, {"format": "pt"})
    assert read(copy) is None
    weights.write_bytes(weights.read_bytes()[:-8])
    assert read(copy) is None
    weights.unlink()
    assert read(copy) is None


def test_it_is_loaded_in_the_background_and_taken_once(base: Path) -> None:
    family = open_base(ModelSpec(base=str(base)))
    early = EarlyDenoiser(family, torch.float32, CPU)
    early.start()
    assert_equal(early.take(), family.load_denoiser(torch.float32))
    later = early.take()
    assert later is not None, "without a thread it is loaded when it is taken"


def test_an_encoder_that_is_loaded_first_frees_it(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = open_base(ModelSpec(base=str(base)))
    results: list[Any] = []

    def read_and_record(*arguments: Any) -> Any:
        results.append(read_module(*arguments))
        return results[-1]

    monkeypatch.setattr(stable_diffusion, "read_module", read_and_record)
    early = EarlyDenoiser(family, torch.float32, CPU)
    early.start()
    family.load_image_encoder(CPU)
    assert early._module is None
    assert len(results) == 1
    assert_equal(early.take(), family.load_denoiser(torch.float32))
    assert len(results) == 2


def test_reading_stops_when_it_is_no_longer_needed(base: Path) -> None:
    answers = iter([True, True, False])
    assert read(base, proceed=lambda: next(answers)) is None


def test_a_family_without_it_loads_its_denoiser_itself() -> None:
    early = EarlyDenoiser(object(), torch.float32, CPU)
    assert early.take() is None
    early.start()
    early.drop()
    assert early.take() is None


def test_a_controlnet_draws_only_the_weights_that_stay_random(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = open_base(ModelSpec(base=str(base)))
    denoiser = family.load_denoiser(torch.float32)
    torch.manual_seed(1)
    with monkeypatch.context() as patches:
        patches.setattr(unet, "_without_overwritten_init", contextlib.nullcontext)
        expected = family.load_controlnet(denoiser, None).state_dict()
    drawn: list[int] = []
    draw = torch.nn.init.kaiming_uniform_

    def draw_and_record(tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        drawn.append(id(tensor))
        return draw(tensor, **options)

    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", draw_and_record)
    torch.manual_seed(1)
    found = family.load_controlnet(denoiser, None)
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())
    assert drawn
    assert not {id(each) for each in found.down_blocks.parameters()}.intersection(drawn)
    number = len(drawn)
    torch.nn.Linear(2, 2)
    assert len(drawn) == number + 1, "other modules draw their weights again"


def test_text_encoders_are_mapped_to_gpus_only(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU nothing changes. The options of a GPU give the same weights, without hooks that move activations."""
    gpu = torch.device("cuda", 1)
    assert parts.mapped_to(CPU) == {}
    assert parts.mapped_to(gpu) == {"device_map": {"": gpu}}
    family = open_base(ModelSpec(base=str(base)))
    plain = family.load_text_encoder(CPU).parts[0].model
    monkeypatch.setattr(parts, "mapped_to", lambda device: {"device_map": {"": device}})
    mapped = family.load_text_encoder(CPU).parts[0].model
    weights = plain.state_dict()
    assert list(mapped.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[name]) for name, value in mapped.state_dict().items())
    assert not any(hasattr(module, "_hf_hook") for module in mapped.modules())
    assert not any(value.requires_grad for value in mapped.parameters())


def test_tensors_of_a_checkpoint_are_mapped_not_copied(tmp_path: Path) -> None:
    """Restoring copies each tensor once, from the file to its place on the device."""
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(1000)}, path)
    value = vars(store_module)["load_file"](path)["weight"]
    mapped = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]
    ranges = [tuple(int(end, 16) for end in each.split("-")) for each in mapped]
    assert any(first <= value.data_ptr() < last for first, last in ranges)
