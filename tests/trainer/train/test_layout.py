"""The layout of images is measured on GPUs with the model's residual blocks, and kept for later attempts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from finetune_trainer.checkpoint.store.select import JobFolders
from finetune_trainer.distributed.world import World
from finetune_trainer.methods.method import Method
from finetune_trainer.report import Reporter
from finetune_trainer.train.tuning.choose import LAYOUT_FILE, Tuner
from finetune_trainer.train.tuning.layout import LAYOUTS, count_calls, describe, fastest, find_blocks, measure_layouts
from testing.trainer import tiny
from testing.trainer.methods import CPU, make_batch, make_method

pytestmark = pytest.mark.trainer

CONTIGUOUS, LAST = torch.contiguous_format, torch.channels_last


class Batches:
    """Stand-in for a BatchMaker with one batch."""

    @staticmethod
    def make(refs: object) -> Any:
        return make_batch("sd1")


def tuner(base: Path, data: Path, folder: Path, notes: list[str], size: int = 1, **training: Any) -> Tuner:
    reporter = Reporter(0, None)
    reporter.note = notes.append  # type: ignore[method-assign, assignment]
    spec = tiny.make_spec(base, data, **training)
    return Tuner(spec, World(0, size, 0, CPU), JobFolders(folder), folder / "cache", reporter)


def weights(method: Method) -> list[Tensor]:
    """Return the weights of convolutions whose layout can be seen."""
    found = [parameter for module in method.modules() for parameter in module.parameters()]
    trained = {id(parameter) for parameter in method.parameters().values()}
    return [each for each in found if each.dim() == 4 and min(each.shape) > 1 and id(each) not in trained]


def in_layout(tensors: list[Tensor], layout: torch.memory_format) -> bool:
    assert tensors
    return all(tensor.is_contiguous(memory_format=layout) for tensor in tensors)


def by_layout(seconds: dict[torch.memory_format, float]) -> Callable[[Callable[[], None]], float]:
    """Return a stand-in for the clock of a GPU: it runs the call, and sees its layout in the inputs."""
    seen: list[torch.memory_format] = []

    def measure(call: Callable[[], None]) -> float:
        def see(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(LAST if args[0].is_contiguous(memory_format=LAST) else CONTIGUOUS)

        hook = nn.modules.module.register_module_forward_pre_hook(see)
        try:
            call()
        finally:
            hook.remove()
        layout = seen[0]
        seen.clear()
        return seconds[layout]

    return measure


def test_residual_blocks_are_counted_by_shape(base: Path) -> None:
    method = make_method(base, "LoRA")
    blocks = find_blocks(method.modules())
    assert blocks
    assert {type(block) for block in blocks} == {ResnetBlock2D}
    calls = count_calls(method.modules(), lambda: method.losses(make_batch("sd1")))
    assert sum(count for _, count in calls) == len(blocks)
    assert len(calls) < len(blocks), "blocks with equal shapes are measured once"
    assert not any(block._forward_pre_hooks for block in blocks)


@pytest.mark.parametrize("name", ["LoRA", "Full", "ControlNet"])
def test_faster_layout_is_used_and_kept(base: Path, data: Path, tmp_path: Path, name: str) -> None:
    notes: list[str] = []
    first = tuner(base, data, tmp_path, notes)
    method = make_method(base, name, dtype=torch.bfloat16)
    before = {key: (value.stride(), value.detach().clone()) for key, value in method.parameters().items()}
    first.choose_layout(method, Batches(), by_layout({CONTIGUOUS: 1.0, LAST: 2.0}))  # type: ignore[arg-type]
    assert notes == [
        "images channels first: residual blocks take 50 % less time than with the other layout on this GPU"
    ]
    assert in_layout(weights(method), CONTIGUOUS)
    for key, value in method.parameters().items():
        assert value.grad is None
        assert value.stride() == before[key][0]
        assert torch.equal(value, before[key][1])
    again = make_method(base, name, dtype=torch.bfloat16)
    first.choose_layout(again, Batches(), lambda call: pytest.fail("measured again"))  # type: ignore[arg-type]
    assert in_layout(weights(again), CONTIGUOUS)
    assert (tmp_path / LAYOUT_FILE).read_text() == '"contiguous"'
    assert len(notes) == 1


def test_channels_last_stays_if_it_is_not_slower(base: Path, data: Path, tmp_path: Path) -> None:
    method, notes = make_method(base, "Full", dtype=torch.bfloat16), list[str]()
    tuner(base, data, tmp_path, notes).choose_layout(method, Batches(), by_layout({CONTIGUOUS: 1.0, LAST: 1.0}))  # type: ignore[arg-type]
    assert in_layout(weights(method), LAST)
    assert "channels last" in notes[0]
    assert fastest({"channelsLast": 3.0, "contiguous": 2.0}) == "contiguous"
    assert "0 % less" in describe({"channelsLast": 0.0, "contiguous": 0.0})


def test_memory_that_runs_out_in_the_measurement_changes_nothing(base: Path, data: Path, tmp_path: Path) -> None:
    def fail(call: Callable[[], None]) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    method, notes = make_method(base, "LoRA"), list[str]()
    tuner(base, data, tmp_path, notes).choose_layout(method, Batches(), fail)  # type: ignore[arg-type]
    assert in_layout(weights(method), LAST)
    assert (tmp_path / LAYOUT_FILE).read_text() == '"channelsLast"'


@pytest.mark.parametrize("training", [{}, {"method": "Full", "sharding": "full"}])
def test_cpus_and_sharded_weights_are_not_measured(
    base: Path, data: Path, tmp_path: Path, training: dict[str, Any]
) -> None:
    """Rank 0 alone cannot gather weights from the others: it would wait for them forever."""
    method, own = make_method(base, "LoRA"), tuner(base, data, tmp_path, [], size=2, **training)
    layouts = [each.stride() for each in weights(method)]
    measure = None if not training else lambda call: pytest.fail("measured")
    own.choose_layout(method, Batches(), measure)  # type: ignore[arg-type]
    own.choose_attention(method, Batches(), None if not training else lambda *_: pytest.fail("measured"))  # type: ignore[arg-type]
    assert [each.stride() for each in weights(method)] == layouts
    assert not list(tmp_path.glob("*.json"))


def test_blocks_beyond_the_time_limit_are_measured_with_neither_layout(base: Path) -> None:
    method, measured = make_method(base, "LoRA"), list[object]()
    calls = count_calls(method.modules(), lambda: method.losses(make_batch("sd1")))
    times = iter([0.0, 0.5, 3.0, 10.0, 20.0, 30.0])

    def measure(call: Callable[[], None]) -> float:
        measured.append(call)
        return 1.0

    seconds = measure_layouts(method, calls, measure, clock=lambda: next(times))
    assert len(measured) == 2
    assert seconds == {"channelsLast": calls[0][1], "contiguous": calls[0][1]}


@pytest.mark.parametrize("name", ["LoRA", "ControlNet"])
def test_layouts_have_the_same_losses_and_gradients(base: Path, name: str) -> None:
    results = []
    for layout in LAYOUTS.values():
        method = make_method(base, name)
        method.use_layout(layout)
        losses = method.losses(make_batch("sd1"))
        torch.autograd.backward(losses.sum())
        results.append([losses.detach(), *(each.grad for each in method.parameters().values())])
    for one, other in zip(*results, strict=True):
        assert one is not None
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
