"""Passes that are captured once per shape and replayed give the same bits as passes without graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune_contract.spec import SwitchMode, TrainingSpec
from finetune_trainer.data.batches import Batch
from finetune_trainer.distributed.buckets import GradientBuckets
from finetune_trainer.distributed.local import LocalGradients
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import ConfigError
from finetune_trainer.fused import mask_draws
from finetune_trainer.methods import adapter_group, denoiser_method
from finetune_trainer.methods.method import Method
from finetune_trainer.train.checks import check_device
from finetune_trainer.train.passes.choice import (
    MAX_GRAPHS,
    SMALL_EXCHANGE_BYTES,
    WARM_UP_PASSES,
    GraphChoice,
    GraphFacts,
    GraphSchedule,
    Turn,
    choose_graphs,
    must_make_room,
)
from finetune_trainer.train.passes.eager import EagerPasses, Passes, PassWork
from finetune_trainer.train.passes.graphed import GraphedPasses
from finetune_trainer.train.passes.make import make_passes
from testing.trainer.graph_stand_in import TapeDevice
from testing.trainer.methods import CPU, SETTINGS, make_batch, make_method

pytestmark = pytest.mark.trainer

WORLD = World(0, 1, 0, CPU)
GPU = GraphFacts(is_gpu=True)
NUM_STEPS = 4
"""Steps of two passes each: the first two steps prepare the captures, the other two replay."""


@dataclass
class Trained:
    """Results of a short training."""

    signals: list[Tensor]
    weights: list[Tensor]
    graphs: TapeDevice


def training(**settings: Any) -> TrainingSpec:
    return TrainingSpec.model_validate({"method": "LoRA", "steps": 1, **settings})


def passes_of(method: Method, graphs: TapeDevice | None, note: Callable[[str], None] = print) -> Passes:
    parameters = list(method.parameters().values())
    work = PassWork(method, LocalGradients(parameters, CPU), 3, 1000)
    return EagerPasses(work) if graphs is None else GraphedPasses(work, parameters, graphs, GraphChoice(True), note)


def train(
    base: Path,
    name: str,
    graphs: TapeDevice | None = None,
    batches: Callable[[int], list[Batch]] | None = None,
    **settings: Any,
) -> Trained:
    """Train a few steps of two passes, the second one with fewer samples."""
    make = batches or (lambda step: [make_batch("sd1", step), make_batch("sd1", 100 + step, count=2)])
    method = make_method(base, name, **settings)
    passes = passes_of(method, graphs)
    gradients = passes.work.gradients if isinstance(passes, EagerPasses) else passes._work.gradients  # type: ignore[attr-defined]
    optimizer = torch.optim.AdamW(method.parameters().values(), lr=0.01)
    signals = []
    for step in range(NUM_STEPS):
        gradients.clear()
        parts = make(step)
        for number, batch in enumerate(parts):
            passes.run(batch, 1000 * step + number, 1.0, number == len(parts) - 1)
        gradients.reduce(WORLD)
        signals.append(torch.cat([gradients.signals, gradients.by_timestep.flatten()]))
        optimizer.step()
    weights = [parameter.detach().clone() for parameter in method.parameters().values()]
    return Trained(signals, weights, graphs or TapeDevice())


def assert_equal(one: Trained, other: Trained) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one.signals, other.signals, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one.weights, other.weights, strict=True))


@pytest.mark.parametrize("name", SETTINGS)
def test_replayed_passes_have_the_same_bits(base: Path, name: str) -> None:
    settings: dict[str, Any] = {"gradientCheckpointing": True} if name in {"Full", "TextualInversion"} else {}
    replayed = train(base, name, TapeDevice(), **settings)
    assert replayed.graphs.num_replays == 2 * (NUM_STEPS - WARM_UP_PASSES)
    assert_equal(train(base, name, **settings), replayed)


def test_replayed_dropout_draws_the_numbers_of_its_seed(base: Path) -> None:
    settings: dict[str, Any] = {"lora": {"rank": 2, "dropout": 0.5}}
    replayed = train(base, "LoRA", TapeDevice(), **settings)
    assert replayed.graphs.num_replays == 4
    assert_equal(train(base, "LoRA", **settings), replayed)
    assert not torch.equal(replayed.signals[-1], train(base, "LoRA").signals[-1])


CHECKPOINTED: dict[str, Any] = {"gradientCheckpointing": True, "lora": {"rank": 2, "dropout": 0.5}}
WITH_TEXT: dict[str, Any] = {**CHECKPOINTED, "lora": {"rank": 2, "dropout": 0.5, "trainTextEncoder": True}}
OF_CONVOLUTIONS: dict[str, Any] = {
    **CHECKPOINTED,
    "lora": {"rank": 2, "dropout": 0.5, "targetModules": ["to_q", "conv1"]},
}


@pytest.fixture(name="_own_masks")
def _use_own_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let adapters draw as on a GPU."""
    monkeypatch.setattr(denoiser_method, "draws_own_masks", lambda training, device: training.lora is not None)


@pytest.mark.usefixtures("_own_masks")
@pytest.mark.parametrize("settings", [CHECKPOINTED, WITH_TEXT, OF_CONVOLUTIONS], ids=["plain", "text", "convolutions"])
def test_replayed_dropout_is_repeated_by_the_recomputation(base: Path, settings: dict[str, Any]) -> None:
    replayed = train(base, "LoRA", TapeDevice(), **settings)
    assert replayed.graphs.num_replays == 4
    assert_equal(train(base, "LoRA", **settings), replayed)


@pytest.mark.usefixtures("_own_masks")
@pytest.mark.parametrize("settings", [CHECKPOINTED, WITH_TEXT, OF_CONVOLUTIONS], ids=["plain", "text", "convolutions"])
def test_recomputed_blocks_have_the_masks_of_their_forward_pass(
    base: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    drawn: list[tuple[bool, tuple[int, ...], tuple[bool, ...]]] = []
    is_backward = False

    def record(shape: Sequence[int], keep: float, device: torch.device) -> Tensor:
        mask = own(shape, keep, device)
        drawn.append((is_backward, tuple(shape), tuple(mask.flatten().tolist())))
        return mask

    own = mask_draws.draw_mask
    monkeypatch.setattr(mask_draws, "draw_mask", record)
    monkeypatch.setattr(adapter_group, "draw_mask", record)
    method = make_method(base, "LoRA", **settings)
    passes = []
    for seed in (1, 2, 1):
        method.seed(seed)
        is_backward = False
        losses = method.losses(make_batch("sd1"))
        is_backward = True
        torch.autograd.backward(losses.sum())
        passes.append(drawn.copy())
        drawn.clear()
    first, again = ({each[1:] for each in passes[0] if each[0] is backward} for backward in (False, True))
    assert again
    assert again <= first, "each recomputed mask is one of the forward pass"
    assert len(first) == sum(not each[0] for each in passes[0]), "no two masks are equal"
    assert passes[0] == passes[2] != passes[1], "the seed of a pass decides its masks"


def test_own_masks_are_drawn_on_gpus_only() -> None:
    gpu = torch.device("cuda")
    spec = training(**CHECKPOINTED)
    assert denoiser_method.draws_own_masks(spec, gpu)
    assert not denoiser_method.draws_own_masks(spec, CPU)
    assert not denoiser_method.draws_own_masks(training(**CHECKPOINTED, compile=True), gpu)
    assert not denoiser_method.draws_own_masks(training(gradientCheckpointing=True), gpu)
    assert choose_graphs(spec, GPU).enabled


def test_dropout_of_a_base_is_repeated_with_saved_random_state() -> None:
    """A base may have dropout of its own: then the state of torch's generator is saved."""
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.1))
    assert denoiser_method.draws_numbers(model)
    assert not denoiser_method.draws_numbers(nn.Sequential(nn.Dropout(0.0)))
    adapted = nn.ModuleDict({"lora_dropout": nn.Dropout(0.1)})
    assert denoiser_method.draws_numbers(adapted)
    assert not denoiser_method.draws_numbers(adapted, with_adapters=False)


def test_replay_uses_the_loss_scale_of_its_step(base: Path) -> None:
    gradients = []
    for graphs in (None, TapeDevice()):
        method = make_method(base, "LoRA")
        passes = passes_of(method, graphs)
        for scale in (4.0, 4.0, 4.0, 2.0):
            for parameter in method.parameters().values():
                if parameter.grad is not None:
                    parameter.grad.zero_()
            passes.run(make_batch("sd1"), 0, scale, is_last=True)
        gradients.append([parameter.grad for parameter in method.parameters().values()])
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


def shapes(step: int) -> list[Batch]:
    """Return batches of two aspect ratios, one with class images and weights."""
    wide = make_batch("sd1", step)
    latents, noise = wide.latents[:, :, :4], wide.noise[:, :, :4]
    plain = make_batch("sd1", 50 + step)
    prior = Batch(
        plain.latents, plain.noise, plain.timesteps, plain.captions, plain.text, weights=torch.rand(3), num_prior=1
    )
    return [Batch(latents, noise, wide.timesteps, wide.captions, wide.text), prior]


def test_each_shape_has_its_own_graph(base: Path) -> None:
    torch.manual_seed(0)
    made = [shapes(step) for step in range(NUM_STEPS)]
    replayed = train(base, "LoRA", TapeDevice(), batches=lambda step: made[step])
    assert len(replayed.graphs.graphs) == 2
    assert_equal(train(base, "LoRA", batches=lambda step: made[step]), replayed)


def test_capture_changes_nothing_and_is_independent_of_where_a_run_starts(base: Path) -> None:
    """A run that starts at another step captures at another step, and computes the same gradients there."""

    def gradients(seeds: range) -> list[Tensor]:
        method = make_method(base, "LoRA", lora={"rank": 2, "dropout": 0.25})
        passes = passes_of(method, TapeDevice())
        for seed in seeds:
            for parameter in method.parameters().values():
                if parameter.grad is not None:
                    parameter.grad.zero_()
            passes.run(make_batch("sd1", seed), seed, 1.0, is_last=True)
        return [parameter.grad.clone() for parameter in method.parameters().values() if parameter.grad is not None]

    replayed, captured, eager = (gradients(range(start, 5)) for start in (0, 2, 4))
    assert all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(replayed, captured, eager, strict=True))


def test_moved_weights_are_captured_again(base: Path) -> None:
    method, graphs = make_method(base, "Full"), TapeDevice()
    passes = passes_of(method, graphs)
    for seed in range(3):
        passes.run(make_batch("sd1", seed), seed, 1.0, is_last=True)
    parameter = next(iter(method.parameters().values()))
    parameter.data = parameter.data.clone()
    passes.run(make_batch("sd1"), 0, 1.0, is_last=True)
    assert [bool(graph.operations) for graph in graphs.graphs] == [False, True]


def fail_with(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "memory ran out while a pass was captured"),
        (RuntimeError("operation not permitted\nwhen capturing"), "a pass cannot be captured: operation not permitted"),
    ],
)
def test_failed_capture_continues_without_graphs(base: Path, error: Exception, reason: str) -> None:
    notes: list[str] = []
    method, graphs = make_method(base, "LoRA"), TapeDevice(fail_with(error))
    passes, plain_method = passes_of(method, graphs, notes.append), make_method(base, "LoRA")
    plain = passes_of(plain_method, None)
    for seed in range(4):
        for each in (passes, plain):
            each.run(make_batch("sd1", seed), seed, 1.0, is_last=True)
    assert notes == [f"cudaGraphs is off because {reason}"]
    assert passes.choice == GraphChoice(False, notes[0])
    for one, other in zip(method.parameters().values(), plain_method.parameters().values(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_failed_capture_of_required_graphs_names_the_field(base: Path) -> None:
    method = make_method(base, "LoRA")
    parameters = list(method.parameters().values())
    work = PassWork(method, LocalGradients(parameters, CPU), 3, 1000)
    graphs = TapeDevice(fail_with(RuntimeError("no")))
    passes = GraphedPasses(work, parameters, graphs, GraphChoice(True, "", SwitchMode.ON), print)
    for seed in range(WARM_UP_PASSES):
        passes.run(make_batch("sd1"), seed, 1.0, is_last=True)
    with pytest.raises(ConfigError, match=r"training\.cudaGraphs: on is not possible because a pass cannot .*: no;"):
        passes.run(make_batch("sd1"), 9, 1.0, is_last=True)


def test_value_that_is_read_on_the_host_cannot_be_captured(base: Path) -> None:
    """The stand-in refuses what a GPU refuses."""
    notes: list[str] = []
    method = make_method(base, "LoRA")
    losses = method.losses
    method.losses = lambda batch: losses(batch) * float(batch.noise.sum())  # type: ignore[method-assign]
    passes = passes_of(method, TapeDevice(), notes.append)
    for seed in range(3):
        passes.run(make_batch("sd1"), seed, 1.0, is_last=True)
    assert "reads a value on the host" in notes[0]


def test_memory_of_graphs_is_freed_when_others_need_it(base: Path) -> None:
    method, graphs = make_method(base, "LoRA"), TapeDevice()
    passes = passes_of(method, graphs)
    for seed in range(3):
        passes.run(make_batch("sd1"), seed, 1.0, is_last=True)
    passes.make_room()
    assert graphs.num_releases == 0
    graphs.free = 2**29
    passes.make_room()
    assert graphs.num_releases == 1
    passes.run(make_batch("sd1"), 3, 1.0, is_last=True)
    assert [bool(graph.operations) for graph in graphs.graphs] == [False, True]
    assert passes.release("memory ran out")
    assert not passes.release("memory ran out")
    assert passes.choice.reason == "cudaGraphs is off because memory ran out"


def test_eager_last_pass_exchanges_gradients_while_it_computes(base: Path) -> None:
    """With an eager last pass, only the other passes are captured; the sums start in the last one."""
    method, graphs = make_method(base, "LoRA"), TapeDevice()
    parameters = list(method.parameters().values())
    gradients = GradientBuckets(parameters, WORLD)
    work = PassWork(method, gradients, 3, 1000)
    passes = GraphedPasses(work, parameters, graphs, GraphChoice(True, is_last_eager=True), print)
    plain_method = make_method(base, "LoRA")
    plain = GradientBuckets(list(plain_method.parameters().values()), WORLD)
    eager = EagerPasses(PassWork(plain_method, plain, 3, 1000))
    for step in range(4):
        for each, some in ((passes, gradients), (eager, plain)):
            some.clear()
            each.run(make_batch("sd1", step), step, 1.0, is_last=False)
            each.run(make_batch("sd1", 10 + step), step, 1.0, is_last=True)
        assert not gradients._waiting
        gradients.reduce(WORLD)
        plain.reduce(WORLD)
        for one, other in zip(parameters, plain_method.parameters().values(), strict=True):
            assert one.grad is not None
            assert other.grad is not None
            assert torch.equal(one.grad, other.grad)
    assert (len(graphs.graphs), graphs.num_replays) == (1, 2)


@pytest.mark.parametrize(
    ("settings", "facts", "reason"),
    [
        ({}, GraphFacts(is_gpu=False), "cudaGraphs is off because the ranks compute on CPUs"),
        ({"cudaGraphs": "off"}, GPU, "cudaGraphs is off because the manifest says so"),
        ({"method": "Full", "sharding": "full"}, GPU, "cudaGraphs is off because sharding gathers weights"),
        ({"method": "Full", "sharding": "full", "offload": "cpu"}, GPU, "cudaGraphs is off because offload copies"),
        (
            {"gradientCheckpointing": True, "lora": {"dropout": 0.1}, "compile": "on"},
            GPU,
            "cudaGraphs is off because gradientCheckpointing repeats the dropout of compiled adapters",
        ),
    ],
)
def test_choice_says_why_graphs_are_off(settings: dict[str, Any], facts: GraphFacts, reason: str) -> None:
    choice = choose_graphs(training(**settings), facts)
    assert not choice.enabled
    assert choice.reason.startswith(reason)
    if "cudaGraphs" not in settings:
        with pytest.raises(ConfigError, match=r"training\.cudaGraphs: on is not possible because .*; write auto, or "):
            choose_graphs(training(**settings, cudaGraphs="on"), facts)


@pytest.mark.parametrize(
    ("num_nodes", "exchange_bytes", "accumulation", "reason"),
    [
        (1, 10 * 2**30, 1, ""),
        (2, SMALL_EXCHANGE_BYTES, 1, ""),
        (2, 10 * 2**30, 4, "the last pass of a step runs without a CUDA graph, so that the ranks exchange 10.0 GiB"),
        (2, 10 * 2**30, 1, "the last pass of a step runs without a CUDA graph, so that the ranks exchange 10.0 GiB"),
    ],
)
def test_large_exchange_between_machines_overlaps_with_the_last_pass(
    num_nodes: int, exchange_bytes: int, accumulation: int, reason: str
) -> None:
    facts = GraphFacts(True, num_ranks=8, num_nodes=num_nodes, exchange_bytes=exchange_bytes)
    choice = choose_graphs(training(gradientAccumulation=accumulation), facts)
    assert choice.enabled
    assert choice.is_last_eager == bool(reason)
    assert choice.reason.startswith(reason)
    assert choice.reason.endswith("is the only one") == (bool(reason) and accumulation == 1)


def test_graphs_that_the_manifest_requires_are_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match=r"training\.cudaGraphs: on is not possible because the ranks compute"):
        check_device(training(cudaGraphs="on"), CPU)


def test_schedule_captures_after_the_warm_up_and_limits_the_graphs() -> None:
    schedule = GraphSchedule(warm_up=1, most=2)
    turns = [schedule.next_turn(shape).value for shape in "aaabbbcc"]
    assert turns == ["eager", "capture", "replay", "eager", "capture", "replay", "eager", "eager"]
    assert schedule.is_full
    schedule.drop()
    assert schedule.next_turn("c") is Turn.CAPTURE
    assert WARM_UP_PASSES < MAX_GRAPHS


def test_room_is_made_only_if_memory_is_scarce() -> None:
    gib = 2**30
    assert not must_make_room(0, 0)
    assert not must_make_room(20 * gib, 10 * gib)
    assert must_make_room(9 * gib, 10 * gib)
    assert must_make_room(7 * gib, 1 * gib)


def test_passes_of_a_rank_follow_the_choice(base: Path) -> None:
    method = make_method(base, "LoRA")
    work = PassWork(method, LocalGradients(list(method.parameters().values()), CPU), 3, 1000)
    notes: list[str] = []
    assert isinstance(make_passes(training(), work, WORLD, notes.append), EagerPasses)
    assert isinstance(make_passes(training(), work, WORLD, notes.append, TapeDevice()), GraphedPasses)
    assert isinstance(make_passes(training(cudaGraphs=False), work, WORLD, notes.append, TapeDevice()), EagerPasses)
    assert notes == []


@pytest.mark.parametrize(("written", "mode"), [(True, "on"), (False, "off"), ("auto", "auto"), ("on", "on")])
def test_switch_accepts_booleans(written: bool | str, mode: str) -> None:
    assert training(cudaGraphs=written, compile=written).cuda_graphs.value == mode
    assert training(compile=written).compile.value == mode
