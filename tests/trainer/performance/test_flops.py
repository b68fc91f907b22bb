"""Operations of every method, counted without data, beside those of a real pass."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from finetune_contract.input_spec import ModelSpec
from finetune_contract.spec import TrainingSpec
from finetune_trainer.data.batches import Batch
from finetune_trainer.models.base import open_base
from finetune_trainer.performance.flops import OperationFlops, SampleFlops, count_pass, shape_key
from testing.trainer.methods import SETTINGS, make_batch, make_method

pytestmark = pytest.mark.trainer
CPU = torch.device("cpu")
SHAPE = "4x8x8"
FAMILY = {"LoRA, text": "sdxl", "ControlNet": "sd2"}


def make_counter(base: Path, name: str, file: Path | None = None, **training: Any) -> SampleFlops:
    spec = TrainingSpec.model_validate({**SETTINGS[name], **training})
    return SampleFlops(open_base(ModelSpec(base=str(base))), spec, file, CPU)


def count(counter: SampleFlops, batch: Batch) -> float:
    """Return the operations of one sample."""
    counter.count(batch)
    found = counter.known(shape_key(batch))
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["LoRA", "LoRA, text", "Full", "TextualInversion", "ControlNet"])
def test_the_count_is_that_of_a_real_pass(name: str, bases: dict[str, Path]) -> None:
    """What gradient checkpointing computes twice counts once."""
    family = FAMILY.get(name, "sd1")
    batch = make_batch(family, caption="<cat>")
    counter = make_counter(bases[family], name, gradientCheckpointing=True)
    before = torch.get_rng_state()
    counter.count(batch)
    of_sample = counter.known(SHAPE)
    assert torch.equal(torch.get_rng_state(), before)
    # Without a fused kernel, which computes the scores again in its backward pass.
    with sdpa_kernel(SDPBackend.MATH):
        real = count_pass(make_method(bases[family], name), batch)
        repeated = count_pass(make_method(bases[family], name, gradientCheckpointing=True), batch)
    assert of_sample == pytest.approx(real / len(batch.latents))
    assert repeated > real


def test_adapters_that_add_in_place_count() -> None:
    weights, rows = nn.Parameter(torch.ones(3, 5)), torch.ones(7, 3)

    def run(add: Any) -> int:
        counter = OperationFlops()
        with counter:
            add(rows, weights.detach())
        return counter.total

    product = 2 * 7 * 3 * 5
    assert run(lambda a, b: a @ b) == product
    assert run(lambda a, b: torch.zeros(7, 5).addmm_(a, b)) == product
    assert run(lambda a, b: torch.zeros(2, 7, 5).baddbmm_(a.expand(2, 7, 3), b.expand(2, 3, 5))) == 2 * product
    assert run(lambda a, b: torch.mm(a, b, out=torch.empty(7, 5))) == product
    assert run(lambda a, _: a + a) == 0


def test_plain_modules_count_as_torch_counts_them() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 4, 3, stride=2), nn.Flatten())
    images = torch.randn(2, 3, 8, 8)
    with FlopCounterMode(display=False) as torchs:
        torch.autograd.grad(layers(images).sum(), list(layers.parameters()))
    with OperationFlops() as ours:
        torch.autograd.grad(layers(images).sum(), list(layers.parameters()))
    assert ours.total == torchs.get_total_flops() > 0


def test_counts_are_kept_for_later_attempts(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, batch = tmp_path / "flops.json", make_batch("sd1")
    counted = count(make_counter(base, "LoRA", file), batch)
    wide = dataclasses.replace(batch, latents=torch.zeros(1, 4, 8, 16), noise=torch.zeros(1, 4, 8, 16))
    wide = dataclasses.replace(
        wide, timesteps=batch.timesteps[:1], captions=("",), text={n: v[:1] for n, v in batch.text.items()}
    )
    assert 1.9 * counted < count(make_counter(base, "LoRA", file), wide) < 2.5 * counted
    assert set(json.loads(file.read_text())["perSample"]) == {"4x8x8", "4x8x16"}
    monkeypatch.setattr(SampleFlops, "_count", lambda *_: 7.0)
    assert make_counter(base, "LoRA", file).known(SHAPE) == counted
    assert count(make_counter(base, "LoRA", file), batch) == counted
    # Other settings can have other operations.
    other = make_counter(base, "LoRA", file, lora={"rank": 4})
    assert other.known(SHAPE) is None
    assert count(other, batch) == 7


@pytest.mark.parametrize("text", ["", "[]", '{"settings": 1}', "{"])
def test_a_damaged_file_is_replaced(text: str, base: Path, tmp_path: Path) -> None:
    file = tmp_path / "flops.json"
    file.write_text(text)
    counter = make_counter(base, "LoRA", file)
    assert counter._counts == {}


def test_a_base_that_cannot_be_counted_does_not_end_the_training(
    base: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter, batch = make_counter(base, "LoRA"), make_batch("sd1")
    calls = []

    def fail(*_: object) -> float:
        calls.append(1)
        raise NotImplementedError("an operation without a meta kernel")

    monkeypatch.setattr(counter, "_count", fail)
    for _ in range(2):
        counter.count(batch)
    assert counter.known(SHAPE) is None
    assert len(calls) == 1
    assert "no share of the peak is reported" in caplog.text
