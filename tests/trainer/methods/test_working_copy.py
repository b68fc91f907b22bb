"""The low-precision copy of trained weights: the same bits as autocast of the fp32 weights, which alone are trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from finetune_contract.outputs.spec import OutputFormat
from finetune_contract.spec import TrainingSpec
from finetune_trainer.checkpoint.state import TrainState
from finetune_trainer.distributed.buckets import GradientBuckets
from finetune_trainer.distributed.local import LocalGradients
from finetune_trainer.distributed.world import World
from finetune_trainer.methods.method import Method
from finetune_trainer.methods.working_copy import WorkingCopy, low_precision_parameters
from finetune_trainer.optim.ema import Ema
from finetune_trainer.optim.optimizer import make_optimizer
from testing.trainer.methods import CPU, export, make_batch, make_method

ALONE = World(0, 1, 0, CPU)
TRAINING = TrainingSpec.model_validate({"steps": 9, "learningRate": 1e-3})
BuildGradients = Callable[[Method], LocalGradients | GradientBuckets]


def local(method: Method) -> LocalGradients:
    return LocalGradients(list(method.parameters().values()), CPU, method.leaves())


def held(method: Method) -> LocalGradients:
    gradients = local(method)
    gradients.hold()
    return gradients


def buckets(method: Method) -> GradientBuckets:
    return GradientBuckets(list(method.parameters().values()), ALONE, leaves=method.leaves())


def held_buckets(method: Method) -> GradientBuckets:
    gradients = buckets(method)
    gradients.hold()
    return gradients


def train(method: Method, family: str = "sd1", build: BuildGradients = local) -> list[Any]:
    """Train for two steps of two micro-batches, and return the losses."""
    gradients, optimizer = build(method), make_optimizer(TRAINING, method.parameters())
    losses = []
    for step in range(2):
        gradients.clear()
        for number in (2 * step, 2 * step + 1):
            each = method.losses(make_batch(family, seed=number, count=1))
            losses.append(each.tolist())
            torch.autograd.backward(each.sum() / 2)
        gradients.reduce(ALONE)
        optimizer.step()
        method.refresh()
    return losses


def assert_same_bits(one: Method, other: Method) -> None:
    for name, parameter in one.parameters().items():
        assert torch.equal(parameter, other.parameters()[name]), name


@pytest.mark.parametrize(
    ("name", "family", "dtype"),
    [
        ("Full", "sd2", torch.bfloat16),
        ("DreamBooth, text", "sdxl", torch.bfloat16),
        ("ControlNet", "sd1", torch.bfloat16),
        ("ControlNet", "sd1", torch.float16),
    ],
)
def test_losses_and_weights_have_the_bits_of_autocast(
    bases: dict[str, Path], name: str, family: str, dtype: torch.dtype
) -> None:
    copied = make_method(bases[family], name, dtype)
    # Sharded weights are cast by autocast in every pass.
    cast_by_autocast = make_method(bases[family], name, dtype, sharding="full")
    assert not same_tensors(copied)
    assert same_tensors(cast_by_autocast)
    assert train(copied, family) == train(cast_by_autocast, family)
    assert_same_bits(copied, cast_by_autocast)


def same_tensors(method: Method) -> bool:
    """Return whether the backward pass computes gradients of the trained weights themselves."""
    return all(map(torch.Tensor.is_set_to, method.leaves(), method.parameters().values()))


@pytest.mark.parametrize("build", [buckets, held, held_buckets])
def test_all_kinds_of_gradients_add_the_same_bits(base: Path, build: BuildGradients) -> None:
    one, other = make_method(base, "Full", torch.bfloat16), make_method(base, "Full", torch.bfloat16)
    assert train(one) == train(other, build=build)
    assert_same_bits(one, other)
    assert not any(leaf.grad is not None and leaf.dtype is torch.bfloat16 for leaf in other.leaves())


def test_fp32_training_has_no_copy(base: Path) -> None:
    for name in ("Full", "ControlNet", "LoRA"):
        assert same_tensors(make_method(base, name))


def test_norms_and_embeddings_stay_fp32(base: Path) -> None:
    method = make_method(base, "DreamBooth, text", torch.bfloat16)
    fp32 = {
        name
        for (name, parameter), leaf in zip(method.parameters().items(), method.leaves(), strict=True)
        if leaf is parameter
    }
    assert all(parameter.dtype is torch.float32 for parameter in method.parameters().values())
    assert all("norm" in name or "embedding.weight" in name for name in fp32)
    assert any("norm" in name for name in fp32)
    assert any("token_embedding" in name for name in fp32)
    assert any("position_embedding" in name for name in fp32)
    assert not any("norm" in name for name in method.parameters().keys() - fp32)


class Shared(nn.Module):
    """A table that is also the weight of a linear layer, and two layers with a common weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.output = nn.Linear(3, 5, bias=False)
        self.output.weight = self.table.weight
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight


def test_weights_that_layers_share_stay_shared() -> None:
    module = Shared()
    assert id(module.table.weight) not in low_precision_parameters([module])
    trained = list(module.parameters())
    copy = WorkingCopy([module], trained, torch.bfloat16)
    assert module.output.weight is module.table.weight is trained[0]
    assert module.first.weight is module.second.weight is copy.leaf(trained[1])
    assert module.first.weight.dtype is torch.bfloat16
    with copy.fp32_weights():
        assert module.first.weight is module.second.weight is trained[1]


class OneWeight(nn.Module):
    """A method with one trained weight, used in bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)
        self.weight: nn.Parameter = cast("nn.Parameter", self.layer.weight)
        self.copy = WorkingCopy([self.layer], [self.weight], torch.bfloat16)


@pytest.mark.parametrize("holds", [False, True])
@pytest.mark.parametrize("kind", ["local", "buckets"])
def test_gradients_of_passes_are_added_in_fp32(kind: str, holds: bool) -> None:
    """In bf16, 256 + 1 is 256."""
    module = OneWeight()
    leaf = module.copy.leaf(module.weight)
    gradients = (
        LocalGradients([module.weight], CPU, [leaf])
        if kind == "local"
        else GradientBuckets([module.weight], ALONE, leaves=[leaf])
    )
    if holds:
        gradients.hold()
    for _ in range(2):
        gradients.clear()
        for size in (256.0, 1.0, 1.0, 1.0):
            torch.autograd.backward(module.layer(torch.full((1, 1), size, dtype=torch.bfloat16)).sum())
        gradients.reduce(ALONE)
        assert module.weight.grad is not None
        assert module.weight.grad.tolist() == [[259.0]]
        assert gradients.norm().tolist() == pytest.approx(259.0)


def test_small_updates_reach_the_weights() -> None:
    """An update of 1 / 1000 of a weight is lost in bf16."""
    module = OneWeight()
    module.weight.data.fill_(1.0)
    for _ in range(8):
        module.weight.data.add_(1e-3)
        module.copy.refresh()
    assert module.weight.item() == pytest.approx(1.008)
    assert module.layer.weight.tolist() == [[1.0078125]]


def test_averaged_weights_are_used_within_their_block_only(base: Path) -> None:
    method = make_method(base, "Full", torch.bfloat16)
    parameters = method.parameters()
    state = TrainState(parameters, make_optimizer(TRAINING, parameters), Ema(parameters), refresh=method.refresh)
    assert state.ema is not None
    train(method)
    before = [leaf.detach().clone() for leaf in method.leaves()]
    averages = {name: average.clone() for name, average in state.ema.tensors.items()}
    with state.averaged():
        for (name, average), leaf in zip(averages.items(), method.leaves(), strict=True):
            assert torch.equal(leaf, average.to(leaf.dtype)), name
    for old, leaf in zip(before, method.leaves(), strict=True):
        assert torch.equal(old, leaf)


def test_restored_weights_are_used(base: Path) -> None:
    one, other = make_method(base, "Full", torch.bfloat16), make_method(base, "Full", torch.bfloat16)
    train(one)
    states = [
        TrainState(method.parameters(), make_optimizer(TRAINING, method.parameters()), refresh=method.refresh)
        for method in (one, other)
    ]
    states[1].restore(states[0].snapshot({}))
    assert one.losses(make_batch("sd1", count=1)).tolist() == other.losses(make_batch("sd1", count=1)).tolist()


@pytest.mark.parametrize("name", ["DreamBooth, text", "ControlNet"])
def test_outputs_are_the_fp32_weights(base: Path, tmp_path: Path, name: str) -> None:
    method = make_method(base, name, torch.bfloat16)
    train(method)
    leaves = method.leaves()
    files = export(method, OutputFormat.DIFFUSERS, tmp_path)
    assert [id(leaf) for leaf in method.leaves()] == [id(leaf) for leaf in leaves]
    written: dict[str, Tensor] = {}
    for file in files:
        if file.suffix == ".safetensors" and file.parent.name in {"unet", "text_encoder", tmp_path.name}:
            part = "" if file.parent == tmp_path else f"{file.parent.name}."
            written |= {f"{part}{key}": value for key, value in load_file(file).items()}
    assert all(value.dtype is torch.float32 for value in written.values())
    for key, parameter in method.parameters().items():
        if key in written:
            assert torch.equal(written[key], parameter), key
    assert len(written.keys() & method.parameters().keys()) > 0.6 * len(method.parameters())
    # The next pass uses the copy again.
    assert all(leaf.dtype is not torch.float32 for leaf in method.leaves() if leaf.dim() == 4)
