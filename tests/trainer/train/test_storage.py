"""How weights, gradients and the optimizer's state are stored: flat tensors, and bf16 weights without fp32 weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from finetune_contract.outputs.spec import OutputFormat
from finetune_contract.spec import TrainingSpec
from finetune_trainer.checkpoint.state import TrainState
from finetune_trainer.distributed import buckets
from finetune_trainer.distributed.buckets import GradientBuckets
from finetune_trainer.distributed.local import LocalGradients
from finetune_trainer.distributed.world import World
from finetune_trainer.methods.method import Method
from finetune_trainer.optim import flat, rounding
from finetune_trainer.optim.adafactor import Adafactor
from finetune_trainer.optim.ema import Ema
from finetune_trainer.optim.flat import FlatTensor, flatten, gradient_of, storage_order
from finetune_trainer.optim.flat_optimizer import FlatOptimizer, StepOptimizer
from finetune_trainer.optim.optimizer import (
    make_flat_optimizer,
    make_optimizer,
    make_rounded_optimizer,
    set_learning_rate,
)
from finetune_trainer.optim.prodigy import Prodigy
from finetune_trainer.optim.rounded_optimizer import RoundedOptimizer
from finetune_trainer.optim.rounding import StochasticRounding
from finetune_trainer.train import storage
from finetune_trainer.train.storage import make_complete_gradients, make_complete_state
from testing.trainer.methods import CPU, SETTINGS, export, make_batch, make_method

ALONE = World(0, 1, 0, CPU)
SHAPES = {"a.weight": (4, 8), "a.bias": (16,), "b.weight": (4, 4, 2, 2), "text_encoder.weight": (2, 16), "c": (16,)}
"""Multiples of the size of a CPU's vectors: it can round the remaining elements of a tensor differently."""
Weights = dict[str, nn.Parameter]
Tensors = Mapping[str, Mapping[str, Tensor]]
MakeOptimizer = Callable[[TrainingSpec, Mapping[str, nn.Parameter]], StepOptimizer | None]


def training(**settings: Any) -> TrainingSpec:
    return TrainingSpec.model_validate({"method": "Full", "steps": 9, "learningRate": 1e-2, **settings})


def make_weights(dtype: torch.dtype = torch.float32) -> Weights:
    generator = torch.Generator().manual_seed(0)
    # Norms are not rounded.
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype if name != "c" else torch.float32))
        for name, shape in SHAPES.items()
    }


def update(state: TrainState, gradients: LocalGradients | GradientBuckets, num_steps: int = 3) -> None:
    """Take steps with gradients that depend on the step only."""
    for _ in range(num_steps):
        generator = torch.Generator().manual_seed(state.step)
        gradients.clear()
        factors = [torch.randn(weight.shape, generator=generator) for weight in state.parameters.values()]
        products = zip(state.parameters.values(), factors, strict=True)
        loss = torch.stack([(weight.float() * factor).sum() for weight, factor in products]).sum()
        torch.autograd.backward(loss)
        gradients.reduce(ALONE)
        set_learning_rate(state.optimizer, 1e-2)
        state.optimizer.step()
        state.step += 1
        state.losses.append(0.5)
        if state.ema is not None:
            state.ema.update(state.step)


def start(
    spec: TrainingSpec, make: MakeOptimizer, weights: Weights | None = None, in_buckets: bool = False
) -> tuple[TrainState, LocalGradients | GradientBuckets]:
    """Return a state before the first step, and its gradients."""
    weights = make_weights() if weights is None else weights
    optimizer = make(spec, weights)
    assert optimizer is not None
    flats = optimizer.flats if isinstance(optimizer, FlatOptimizer) else ()
    ordered = list(weights.values())
    if flats:
        ordered = [ordered[index] for index in storage_order(ordered)]
    gradients = GradientBuckets(ordered, ALONE) if in_buckets else LocalGradients(ordered, CPU)
    if isinstance(optimizer, FlatOptimizer | RoundedOptimizer):
        gradients.hold()
        optimizer.attach(dict(zip(ordered, gradients.views(), strict=True)))
    return TrainState(weights, optimizer, Ema(weights, flats)), gradients


def contents(state: TrainState) -> dict[str, dict[str, Tensor]]:
    """Return copies of the tensors of a checkpoint."""
    return {
        group: {name: value.clone() for name, value in tensors.items()}
        for group, tensors in state.snapshot({}).tensors.items()
    }


def assert_same_bits(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    for group, tensors in one.items():
        assert tensors.keys() == other[group].keys()
        for name, value in tensors.items():
            assert torch.equal(value, other[group][name]), name
            assert value.dtype is other[group][name].dtype


CASES = [{}, {"optimizer": "prodigy", "learningRate": 1}, {"textEncoderLearningRate": 3e-3}, {"adamWeightDecay": 0.1}]


@pytest.mark.parametrize("settings", CASES)
@pytest.mark.parametrize("bucket_numel", [48, 1 << 24])
@pytest.mark.parametrize("in_buckets", [False, True])
def test_flat_tensors_give_the_same_bits_and_checkpoints(
    settings: dict[str, Any], bucket_numel: int, in_buckets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (buckets, flat):
        monkeypatch.setattr(module, "BUCKET_NUMEL", bucket_numel)
    spec = training(**settings)
    one, other = start(spec, make_flat_optimizer, in_buckets=in_buckets), start(spec, make_optimizer)
    assert isinstance(one[0].optimizer, FlatOptimizer)
    has_two_groups = spec.text_encoder_learning_rate is not None
    assert len(one[0].optimizer.flats) == (3 + has_two_groups if bucket_numel == 48 else 1 + 2 * has_two_groups)
    update(*one)
    update(*other)
    if spec.optimizer == "prodigy":
        # Its sums over all weights are added in another order.
        torch.testing.assert_close(contents(one[0]), contents(other[0]), rtol=1e-6, atol=1e-9)
    else:
        assert_same_bits(contents(one[0]), contents(other[0]))


@pytest.mark.parametrize("settings", CASES)
@pytest.mark.parametrize("makes", [(make_flat_optimizer, make_optimizer), (make_optimizer, make_flat_optimizer)])
def test_a_run_continues_from_a_checkpoint_with_or_without_flat_tensors(
    settings: dict[str, Any], makes: tuple[MakeOptimizer, MakeOptimizer]
) -> None:
    spec = training(**settings)
    one, other = (start(spec, make) for make in makes)
    update(*one)
    update(*other, num_steps=1)
    snapshot = one[0].snapshot({})
    saved = type(snapshot)(snapshot.step, contents(one[0]), snapshot.values)
    other[0].restore(saved)
    assert_same_bits(contents(other[0]), saved.tensors)
    update(*one)
    update(*other)
    torch.testing.assert_close(contents(one[0]), contents(other[0]), rtol=1e-6, atol=1e-9)
    # A checkpoint from before the first step has no state of the optimizer.
    other[0].restore(type(snapshot)(0, {"model": saved.tensors["model"], "ema": saved.tensors["ema"]}, snapshot.values))
    assert "optimizer" not in {group for group, tensors in contents(other[0]).items() if tensors}


def test_an_average_is_applied_within_its_block_only() -> None:
    state, gradients = start(training(), make_flat_optimizer)
    update(state, gradients)
    assert state.ema is not None
    before, averages = contents(state)["model"], contents(state)["ema"]
    with state.ema.applied():
        for name, weight in state.parameters.items():
            assert torch.equal(weight, averages[name])
    assert_same_bits({"model": before, "ema": averages}, {name: contents(state)[name] for name in ("model", "ema")})


def test_parameters_that_are_neighbours_stay_where_they_are() -> None:
    """The storage of adapters is also read by their layers."""
    memory = torch.arange(12.0)
    second, first = nn.Parameter(memory[4:6]), nn.Parameter(memory[:4].view(2, 2))
    alone = nn.Parameter(torch.ones(3))
    last, other = nn.Parameter(memory[8:]), nn.Parameter(torch.zeros(2))
    parameters = [second, alone, first, other, last]
    order = storage_order(parameters)
    assert order == [2, 0, 4, 1, 3]
    ordered = [parameters[index] for index in order]
    flats = flatten(ordered, [0] * 5)
    assert [[len(member) for member in each.members] for each in flats] == [[2, 2], [4], [3, 2]]
    assert flats[0].parameter.data_ptr() == memory.data_ptr()
    for each in flats:
        with torch.no_grad():
            each.parameter.add_(100)
    assert memory.tolist() == [*range(100, 106), 6, 7, *range(108, 112)]
    assert alone.tolist() == [101.0] * 3


def test_gradients_that_are_no_neighbours_are_refused() -> None:
    members = (nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2)))
    tensor = FlatTensor(nn.Parameter(torch.zeros(4)), members, 0)
    buffer = torch.arange(5.0)
    assert gradient_of(tensor, [buffer[1:3], buffer[3:]]).tolist() == [1, 2, 3, 4]
    for wrong in ([buffer[:2], buffer[3:]], [buffer[:2], torch.zeros(2)]):
        with pytest.raises(ValueError, match="not neighbours"):
            gradient_of(tensor, wrong)


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [(Prodigy, {"weight_decay": 0.1, "betas": (0.9, 0.99)}), (Adafactor, {"lr": 1e-2, "weight_decay": 0.1})],
)
def test_steps_on_a_gpu_read_no_number_and_take_the_same_steps(
    optimizer: Callable[..., Any], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU takes the steps of GPUs here: the class asks the weights where they are."""
    ours, reference = make_weights(), make_weights()
    on_device, on_host = optimizer(ours.values(), **settings), optimizer(reference.values(), **settings)
    for number in range(6):
        generator = torch.Generator().manual_seed(number)
        for one, other in zip(ours.values(), reference.values(), strict=True):
            one.grad = torch.randn(one.shape, generator=generator) + 1
            other.grad = one.grad.clone()
        on_host.step()
        with monkeypatch.context() as patch:
            patch.setattr(nn.Parameter, "is_cpu", False, raising=False)
            on_device.step()
        assert on_device.state[ours["c"]].keys() == on_host.state[reference["c"]].keys()
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-7)


@pytest.fixture(name="small_chunks")
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "_CHUNK", 16)


def test_rounding_keeps_the_expected_value() -> None:
    rounds = StochasticRounding(0, CPU)
    values = torch.tensor([1 + 1 / 1024, -1 - 3 / 1024, 3e-5, -7.0, 0.0, 1e30]).repeat(500)
    total = torch.zeros_like(values, dtype=torch.float64)
    for step in range(40):
        rounded = values.clone()
        rounds.round_(rounded, step, 0)
        assert torch.equal(rounded, rounded.bfloat16().float())
        # Each number becomes one of its two neighbours.
        assert ((rounded - values).abs() <= values.abs() / 128).all()
        total += rounded
    means = (total / 40).view(500, 6)
    torch.testing.assert_close(means.mean(0), values[:6].double(), rtol=1e-4, atol=0)
    # The elements are rounded independently, and each one in both directions.
    assert 0.6 < means[:, 0].sub(1).std() / (2**-7 * (0.125 * 0.875 / 40) ** 0.5) < 1.4
    assert (means[:, 4] == 0).all()
    assert (means[:, 3] == -7).all()


def test_random_bits_depend_on_seed_step_tensor_and_position_only(small_chunks: None) -> None:
    del small_chunks
    values = torch.full((200,), 1 + 1 / 256)

    def rounded(seed: int = 0, step: int = 0, tensor: int = 0, count: int = 200) -> list[float]:
        copy = values[:count].clone()
        StochasticRounding(seed, CPU).round_(copy, step, tensor)
        return copy.tolist()

    assert rounded() == rounded()
    assert rounded(count=50) == rounded()[:50]
    for other in (rounded(seed=1), rounded(step=1), rounded(tensor=1)):
        share = sum(one == two for one, two in zip(rounded(), other, strict=True)) / 200
        assert 0.3 < share < 0.7


ROUNDED = {"precision": "bf16", "weightPrecision": "bf16"}


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_rounded_weights_continue_bit_for_bit(optimizer: str) -> None:
    spec = training(**ROUNDED, optimizer=optimizer, textEncoderLearningRate=3e-3)
    one, other = (start(spec, make_rounded_optimizer, make_weights(torch.bfloat16)) for _ in range(2))
    update(*one)
    snapshot = one[0].snapshot({})
    other[0].restore(type(snapshot)(snapshot.step, contents(one[0]), snapshot.values))
    update(*one)
    update(*other)
    saved = contents(one[0])
    assert_same_bits(saved, contents(other[0]))
    dtypes = {name: value.dtype for name, value in saved["model"].items()}
    assert dtypes == dict.fromkeys(SHAPES, torch.bfloat16) | {"c": torch.float32}
    assert all(value.dtype is torch.float32 for group in ("optimizer", "ema") for value in saved[group].values())


def test_rounded_weights_do_not_depend_on_how_gradients_are_stored() -> None:
    """A single rank and several ranks store them differently."""
    spec = training(**ROUNDED)
    one = start(spec, make_rounded_optimizer, make_weights(torch.bfloat16))
    other = start(spec, make_rounded_optimizer, make_weights(torch.bfloat16), in_buckets=True)
    update(*one)
    update(*other)
    assert_same_bits(contents(one[0]), contents(other[0]))


def test_rounded_weights_follow_fp32_weights_where_plain_bf16_weights_stand_still() -> None:
    """Each update is a fifth of the distance between two numbers of bf16."""
    spec = training(**ROUNDED, adamWeightDecay=0.0)
    exact = {"w": nn.Parameter(torch.ones(4096))}
    rounded, plain = ({"w": nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))} for _ in range(2))
    rounding_optimizer = make_rounded_optimizer(spec, rounded)
    optimizers: list[StepOptimizer] = [make_optimizer(spec, exact), rounding_optimizer, make_optimizer(spec, plain)]
    gradient = torch.ones(4096)
    rounding_optimizer.attach({rounded["w"]: gradient})
    exact["w"].grad, plain["w"].grad = gradient, gradient.bfloat16()
    for _ in range(100):
        for optimizer in optimizers:
            set_learning_rate(optimizer, 2**-8 / 5)
            optimizer.step()
    assert exact["w"].detach().mean().item() == pytest.approx(1 - 100 * 2**-8 / 5, abs=1e-4)
    assert rounded["w"].detach().float().mean().item() == pytest.approx(exact["w"].detach().mean().item(), abs=1e-3)
    assert (plain["w"] == 1).all()


def test_the_average_of_rounded_weights_is_fp32_and_leaves_them_unchanged() -> None:
    spec = training(**ROUNDED)
    state, gradients = start(spec, make_rounded_optimizer, make_weights(torch.bfloat16))
    update(state, gradients)
    assert state.ema is not None
    before = contents(state)
    with state.ema.applied():
        for name, weight in state.parameters.items():
            assert torch.equal(weight, before["ema"][name].to(weight.dtype))
    assert_same_bits(before, contents(state))


def train(method: Method, spec: TrainingSpec, world: World = ALONE, num_steps: int = 2) -> tuple[TrainState, list[Any]]:
    """Train a method on a tiny base, stored as in a rank, and return its state and the losses."""
    state = make_complete_state(spec, method, CPU)
    gradients = make_complete_gradients(spec, method, state, world)
    losses = []
    for step in range(num_steps):
        gradients.clear()
        each = method.losses(make_batch("sd1", seed=step, count=1))
        losses.append(each.tolist())
        torch.autograd.backward(each.sum())
        gradients.reduce(world)
        state.optimizer.step()
        state.refresh()
        state.step += 1
        state.losses.append(losses[-1][0])
        if state.ema is not None:
            state.ema.update(state.step)
    return state, losses


@pytest.mark.parametrize(
    ("name", "dtype", "num_flats"),
    [("LoRA", torch.float32, 1), ("Full", torch.bfloat16, 1), ("TextualInversion", torch.float32, 1)],
)
def test_methods_train_the_same_weights_in_flat_tensors(
    base: Path, name: str, dtype: torch.dtype, num_flats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for is_flat in (False, True):
        monkeypatch.setattr(storage, "uses_flat_tensors", lambda _, value=is_flat: value)
        spec = TrainingSpec.model_validate({**SETTINGS[name], "steps": 9, "ema": True})
        state, losses = train(make_method(base, name, dtype), spec)
        results.append((losses, contents(state)))
        if is_flat:
            assert isinstance(state.optimizer, FlatOptimizer)
            assert len(state.optimizer.flats) == num_flats
    assert results[0][0] == results[1][0]
    assert_same_bits(results[0][1], results[1][1])


@pytest.mark.parametrize("name", ["Full", "ControlNet"])
def test_methods_train_rounded_weights_and_write_fp32_files(base: Path, tmp_path: Path, name: str) -> None:
    spec = TrainingSpec.model_validate({**SETTINGS[name], "steps": 9, **ROUNDED, "learningRate": 1e-3})
    method = make_method(base, name, torch.bfloat16, **ROUNDED)
    state, losses = train(method, spec)
    exact = make_method(base, name, torch.bfloat16)
    _, reference = train(exact, spec.model_copy(update={"weight_precision": "fp32"}))
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(reference), rtol=0.05, atol=0.02)
    folder = tmp_path / "unet" if name == "Full" else tmp_path
    export(method, OutputFormat.DIFFUSERS, tmp_path)
    written = {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
    prefix = "unet." if name == "Full" else ""
    assert {f"{prefix}{key}" for key in written} == state.parameters.keys()
    for key, value in written.items():
        assert value.dtype is torch.float32
        assert torch.equal(value, state.parameters[f"{prefix}{key}"].float())
    low = [weight for weight in state.parameters.values() if weight.dtype is torch.bfloat16]
    assert len(low) > len(state.parameters) / 2
    # The next pass uses the trained weights again.
    assert all(map(Tensor.is_set_to, method.leaves(), state.parameters.values()))
    method.losses(make_batch("sd1", count=1))
