"""The loop's smaller parts: optimizer, schedule, moving average, state, reports and the preemption notice."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers.optimization import Adafactor

from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import RankState
from finetune_contract.spec import LrScheduler, TrainingSpec
from finetune_trainer.checkpoint.state import TrainState
from finetune_trainer.data.sampling.order import SampleRef
from finetune_trainer.errors import ConfigError
from finetune_trainer.optim.ema import Ema, decay_at
from finetune_trainer.optim.loss_scale import FIRST_SCALE, STEPS_TO_DOUBLE, LossScale
from finetune_trainer.optim.optimizer import learning_rate, make_optimizer, set_learning_rate
from finetune_trainer.optim.prodigy import Prodigy
from finetune_trainer.report import Reporter
from finetune_trainer.tensor_file import write_tensors
from finetune_trainer.train.pictures import build_grid
from finetune_trainer.train.preemption_notice import PreemptionNotice
from finetune_trainer.train.validation import NUM_TIMESTEPS, spread_timestep


def make_training(**settings: Any) -> TrainingSpec:
    return TrainingSpec.model_validate({"method": "LoRA", "learningRate": 0.1, **settings})


def learning_rates(name: LrScheduler) -> list[float]:
    rate = learning_rate(make_training(lrScheduler=name.value, lrWarmupSteps=10), 100)
    return [rate(step) for step in range(100)]


@pytest.mark.parametrize("name", list(LrScheduler))
def test_schedules_never_exceed_the_peak(name: LrScheduler) -> None:
    assert all(0 <= value <= 0.1 + 1e-9 for value in learning_rates(name))


@pytest.mark.parametrize("name", sorted(set(LrScheduler) - {LrScheduler.CONSTANT}))
def test_schedules_with_warmup_rise_from_zero(name: LrScheduler) -> None:
    assert learning_rates(name)[:3] == pytest.approx([0, 0.01, 0.02])


@pytest.mark.parametrize("name", [LrScheduler.LINEAR, LrScheduler.COSINE])
def test_decaying_schedules_end_near_zero(name: LrScheduler) -> None:
    assert learning_rates(name)[-1] < 0.002


@pytest.mark.parametrize("peak", [1e-6, 1e-7, 2e-9])
@pytest.mark.parametrize("name", list(LrScheduler))
def test_schedules_accept_any_peak(name: LrScheduler, peak: float) -> None:
    rate = learning_rate(make_training(lrScheduler=name.value, learningRate=peak), 100)
    assert all(0 <= rate(step) <= peak * (1 + 1e-9) for step in range(101))
    assert rate(0 if name is not LrScheduler.CONSTANT_WITH_WARMUP else 1) == pytest.approx(peak)


def test_cosine_with_restarts_returns_to_the_peak() -> None:
    rate = learning_rate(make_training(lrScheduler="cosine_with_restarts", lrNumCycles=3), 300)
    starts = [step for step in range(300) if rate(step) == pytest.approx(0.1)]
    assert starts == [0, 100, 200]
    assert [rate(step) for step in (50, 150, 250)] == pytest.approx([0.05] * 3)
    assert all(rate(step) < 1e-4 for step in (99, 199, 299))


@pytest.mark.parametrize(("power", "middle"), [(None, 0.5), (1.0, 0.5), (2.0, 0.25), (0.5, 0.5**0.5)])
def test_polynomial_has_the_power_of_the_manifest(power: float | None, middle: float) -> None:
    settings = {} if power is None else {"lrPower": power}
    rate = learning_rate(make_training(lrScheduler="polynomial", **settings), 100)
    assert rate(50) == pytest.approx(0.1 * middle, rel=1e-4)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adafactor_is_that_of_transformers_without_scaling_and_relative_steps(weight_decay: float) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    # Adapters start at zero; scaling by the weights would keep them there.
    ours = [nn.Parameter(value) for value in (torch.zeros(5, 7), 1e-3 * normal(6, 2), normal(4), normal(3, 2, 3, 3))]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    training = make_training(optimizer="adafactor", adamWeightDecay=weight_decay)
    optimizer = make_optimizer(training, named(ours))
    reference = Adafactor(theirs, lr=0.1, scale_parameter=False, relative_step=False, weight_decay=weight_decay)
    for number in range(12):
        rate = 1e-3 * (number + 1)
        set_learning_rate(optimizer, rate)
        set_learning_rate(reference, rate)
        for one, other in zip(ours, theirs, strict=True):
            one.grad = normal(*one.shape) * 10.0 ** (number % 5 - 3)
            other.grad = one.grad.clone()
        optimizer.step()
        reference.step()
        assert optimizer.param_groups[0]["lr"] == rate
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert ours[0].abs().mean() > 5e-3


def test_adafactor_continues_from_the_state_of_earlier_versions() -> None:
    """Those used torch's class; its state is the same, so their checkpoints stay valid."""
    parameter = nn.Parameter(torch.ones(3, 4))
    old = torch.optim.Adafactor([parameter], lr=0.1)
    parameter.grad = torch.full_like(parameter, 0.5)
    old.step()  # type: ignore[no-untyped-call]
    optimizer = make_optimizer(make_training(optimizer="adafactor", adamWeightDecay=0.0), {"p": parameter})
    optimizer.step()
    new = make_optimizer(make_training(optimizer="adafactor", adamWeightDecay=0.0), {"p": parameter})
    new.state[parameter] = {name: value.clone() for name, value in old.state[parameter].items()}
    before = parameter.detach().clone()
    new.step()
    assert new.state[parameter].keys() == optimizer.state[parameter].keys()
    assert float(new.state[parameter]["step"]) == 2
    torch.testing.assert_close(parameter, before - 0.1)


def named(parameters: Iterable[nn.Parameter]) -> dict[str, nn.Parameter]:
    return {str(number): parameter for number, parameter in enumerate(parameters)}


def test_text_encoders_can_have_their_own_learning_rate() -> None:
    """Both rates follow the schedule; a job without the field has one group, as in earlier releases."""
    parameters = {name: nn.Parameter(torch.ones(2)) for name in ("down.weight", "text_encoder.w", "text_encoder_2.w")}
    training = make_training(learningRate=1e-2, textEncoderLearningRate=2e-3, adamWeightDecay=0.0)
    optimizer = make_optimizer(training, parameters)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    set_learning_rate(optimizer, 5e-3)
    optimizer.step()
    moved = [float((1 - parameter[0]).detach()) for parameter in parameters.values()]
    assert moved == pytest.approx([5e-3, 1e-3, 1e-3], rel=1e-4)
    assert len(make_optimizer(make_training(), parameters).param_groups) == 1


def test_learning_rate_does_not_depend_on_earlier_steps() -> None:
    rate = learning_rate(make_training(lrScheduler="cosine"), 100)
    late = rate(70)
    rate(3)
    assert rate(70) == late


def test_prodigy_matches_the_paper() -> None:
    """Compares with Algorithm 4 of https://arxiv.org/abs/2306.06101, implemented with numpy."""
    start = np.array([1.0, -2.0, 0.5])
    parameter = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = Prodigy([parameter], lr=1.0, betas=(0.9, 0.99), eps=1e-8)
    x, d, r = start.copy(), 1e-6, 0.0
    m, v, s = np.zeros(3), np.zeros(3), np.zeros(3)
    for number in range(60):
        g = 2 * (x - 3.0) * [1.0, 0.5, 0.1] + 0.01 * number
        parameter.grad = torch.tensor(g)
        optimizer.step()
        m = 0.9 * m + 0.1 * d * g
        v = 0.99 * v + 0.01 * d**2 * g**2
        r = math.sqrt(0.99) * r + (1 - math.sqrt(0.99)) * d**2 * g @ (start - x)
        s = math.sqrt(0.99) * s + (1 - math.sqrt(0.99)) * d**2 * g
        x = x - d * m / (np.sqrt(v) + d * 1e-8)
        d = max(d, r / np.abs(s).sum())
        assert parameter.detach().numpy() == pytest.approx(x, rel=1e-4)
    assert d > 1e-4


def test_prodigy_converges_with_its_default_learning_rate() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = Prodigy([parameter])
    for _ in range(300):
        parameter.grad = 2 * (parameter.detach() - 7.0)
        optimizer.step()
    assert parameter.tolist() == pytest.approx([7.0] * 4, abs=0.5)


def test_loss_scale_falls_and_rises() -> None:
    scale = LossScale()
    scale.record_overflow()
    assert scale.value == FIRST_SCALE / 2
    for _ in range(STEPS_TO_DOUBLE - 1):
        scale.record_finite()
    other = LossScale()
    other.restore(json.loads(json.dumps(scale.values())))
    other.record_finite()
    assert other.value == FIRST_SCALE
    with pytest.raises(ConfigError, match=r"training\.precision: the gradients overflow fp16 in every step"):
        for _ in range(100):
            other.record_overflow()


def test_moving_average_follows_the_parameters() -> None:
    assert decay_at(1) < decay_at(100) < decay_at(10**9) == 0.9999
    parameter = nn.Parameter(torch.zeros(2))
    ema = Ema({"w": parameter})
    parameter.data.fill_(1.0)
    ema.update(1)
    expected = 1 - decay_at(1)
    with ema.applied():
        assert parameter.tolist() == pytest.approx([expected] * 2)
    assert parameter.tolist() == [1.0, 1.0]


def make_state(with_ema: bool = True, **training: Any) -> TrainState:
    torch.manual_seed(0)
    parameters = {"a": nn.Parameter(torch.randn(3)), "b.c": nn.Parameter(torch.randn(2, 2))}
    optimizer = make_optimizer(make_training(**training), parameters)
    return TrainState(parameters, optimizer, Ema(parameters) if with_ema else None)


def step(state: TrainState) -> None:
    for number, parameter in enumerate(state.parameters.values()):
        parameter.grad = torch.full_like(parameter, 0.1 * (number + state.step))
    set_learning_rate(state.optimizer, 0.01)
    state.optimizer.step()
    state.step += 1
    state.losses.append(1 / state.step)
    assert state.ema is not None
    state.ema.update(state.step)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "prodigy"])
def test_restored_state_continues_bit_for_bit(optimizer: str) -> None:
    one, other = make_state(optimizer=optimizer), make_state(optimizer=optimizer)
    for _ in range(3):
        step(one)
    snapshot = one.snapshot({"seed": 0})
    json.dumps(snapshot.values)
    assert set(snapshot.tensors) == {"model", "optimizer", "ema"}
    copies = {group: {name: value.clone() for name, value in each.items()} for group, each in snapshot.tensors.items()}
    other.restore(type(snapshot)(snapshot.step, copies, snapshot.values))
    assert other.mean_loss == one.mean_loss
    for _ in range(3):
        step(one)
        step(other)
    for name, parameter in one.parameters.items():
        assert torch.equal(parameter, other.parameters[name])
    again, reference = other.snapshot({}), one.snapshot({})
    for group, tensors in reference.tensors.items():
        for name, value in tensors.items():
            assert torch.equal(value, again.tensors[group][name])


def test_state_before_the_first_step() -> None:
    state = make_state()
    state.restore(make_state().snapshot({}))
    assert state.step == 0
    assert state.mean_loss != state.mean_loss


def test_checkpoint_of_other_shapes_is_refused() -> None:
    snapshot = make_state().snapshot({})
    state = make_state()
    state.parameters = {"a": nn.Parameter(torch.randn(4))}
    with pytest.raises(ConfigError, match="training: the checkpoints of this job hold other weights"):
        state.restore(snapshot)


def test_checkpoint_without_moving_average_is_refused() -> None:
    with pytest.raises(ConfigError, match="other weights"):
        make_state().restore(make_state(with_ema=False).snapshot({}))


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def read_reports(fd: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in os.read(fd, 65536).decode().splitlines()]


def test_progress_reports_are_rate_limited_and_state_changes_are_not() -> None:
    reader, writer = os.pipe()
    clock = _Clock()
    reporter = Reporter(1, writer, clock)
    reporter.state(RankState.TRAINING)
    reporter.state(RankState.TRAINING)
    for number in range(1, 5):
        clock.now += 0.15
        reporter.progress(number, float("nan") if number == 4 else 0.5, 2.0)
    reporter.warn("look")
    reporter.state(RankState.SAVING)
    reports = read_reports(reader)
    assert [(report["state"], report.get("step")) for report in reports] == [
        ("Training", None),
        ("Training", 2),
        ("Training", 4),
        ("Training", 4),
        ("Saving", 4),
    ]
    assert "loss" not in reports[-1]
    assert reports[1]["loss"] == 0.5
    assert reports[-1]["warnings"] == ["look"]
    assert all(report["rank"] == 1 for report in reports)


def test_a_wait_is_reported_at_once() -> None:
    """The next report may be minutes away, and the status would show progress that stands still."""
    reader, writer = os.pipe()
    reporter = Reporter(0, writer, _Clock())
    reporter.state(RankState.LOADING)
    reporter.waiting("fetching me/base failed: try 2 in 30 s")
    reporter.waiting("")
    assert [report.get("detail") for report in read_reports(reader)] == [
        None,
        "fetching me/base failed: try 2 in 30 s",
        "",
    ]


def test_full_or_closed_pipe_never_blocks() -> None:
    reader, writer = os.pipe()
    reporter = Reporter(0, writer)
    for number in range(3000):
        reporter.warn(f"message {number} {'x' * 40}")
    os.close(reader)
    reporter.state(RankState.SAVING)
    Reporter(0, None).state(RankState.DONE)


def _receive_notice(held: bool, report: Path) -> None:
    def on_leave() -> None:
        report.write_text("leaving", encoding="utf-8")

    notice = PreemptionNotice(on_leave)
    notice.listen()
    if held:
        notice.hold()
    os.kill(os.getpid(), signal.SIGTERM)
    if held:
        while not notice.given:
            pass
        report.write_text("held", encoding="utf-8")
        os._exit(ExitCode.STORAGE)
    # A C call that a Python signal handler cannot interrupt.
    reader, _ = os.pipe()
    os.read(reader, 1)


@pytest.mark.parametrize("held", [True, False])
def test_preemption_notice_ends_the_process_unless_it_is_held(held: bool, tmp_path: Path) -> None:
    process_id = os.fork()
    if process_id == 0:
        _receive_notice(held, tmp_path / "report")
        os._exit(1)
    _, status = os.waitpid(process_id, 0)
    assert os.waitstatus_to_exitcode(status) == (ExitCode.STORAGE if held else ExitCode.SAVED)
    assert (tmp_path / "report").read_text() == ("held" if held else "leaving")


def test_grid_has_a_row_for_each_label_and_a_column_for_each_caption() -> None:
    pictures = [Image.new("RGB", (16, 16), color) for color in ("red", "green", "blue")]
    grid = build_grid([("before", pictures), ("after\n9 steps", pictures)], ["one", "two", "many words " * 6])
    colors = [color for _, color in grid.getcolors(2**20) or []]
    assert {(255, 0, 0), (0, 128, 0), (0, 0, 255)} <= set(colors)
    assert grid.width > 3 * 192
    assert grid.height > 2 * 192


def test_held_out_timesteps_cover_the_schedule_evenly() -> None:
    refs = [SampleRef(quarter, index) for quarter in range(NUM_TIMESTEPS) for index in range(16)]
    timesteps = sorted(spread_timestep(ref, 16, 1000) for ref in refs)
    gaps = {following - one for one, following in pairwise(timesteps)}
    assert gaps <= {15, 16}
    assert timesteps[0] < 16
    assert timesteps[-1] >= 984


def test_tensor_files_do_not_depend_on_the_order(tmp_path: Path) -> None:
    from safetensors import safe_open  # noqa: PLC0415

    tensors = {"b": torch.ones(3), "a": torch.zeros(2, 2, dtype=torch.bfloat16)}
    metadata = {"format": "pt", "about": "x" * 9, "zebra": "é"}
    write_tensors(tmp_path / "one", tensors, metadata)
    write_tensors(tmp_path / "two", dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with safe_open(tmp_path / "one", framework="pt") as file:
        assert file.metadata() == metadata
        for name, value in tensors.items():
            assert torch.equal(file.get_tensor(name), value)
