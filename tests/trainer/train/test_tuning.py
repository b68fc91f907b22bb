"""Kernels, compiled code and number formats that are chosen for the device of a run, and kept for later attempts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.nn.attention import SDPBackend

from finetune_contract.spec import Precision, SwitchMode, TrainingSpec
from finetune_trainer.checkpoint.store.select import JobFolders
from finetune_trainer.distributed.world import World
from finetune_trainer.methods.kernels import checkpoint_activations
from finetune_trainer.report import Reporter
from finetune_trainer.train.tuning import compiled
from finetune_trainer.train.tuning.arithmetic import set_up_gpu
from finetune_trainer.train.tuning.attention import AttentionShape, backends_of, count_shapes, names_of, order_backends
from finetune_trainer.train.tuning.choose import ATTENTION_FILE, Tuner
from finetune_trainer.train.tuning.compiled import CompileFacts, choose_compile
from finetune_trainer.train.tuning.record import KeptChoice
from testing.trainer import tiny
from testing.trainer.methods import CPU, make_batch, make_method

pytestmark = pytest.mark.trainer

WORLD = World(0, 1, 0, CPU)
FLASH, CUDNN, EFFICIENT = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
LARGE = AttentionShape((1, 8, 4096, 64), (1, 8, 4096, 64), torch.bfloat16)
SMALL = AttentionShape((1, 8, 4096, 64), (1, 8, 77, 64), torch.bfloat16)


def measured(
    seconds: dict[tuple[AttentionShape, SDPBackend], float],
) -> Callable[[AttentionShape, SDPBackend], float | None]:
    return lambda shape, backend: seconds.get((shape, backend))


def test_fastest_kernel_of_all_calls_comes_first() -> None:
    of_large, of_small = {FLASH: 2.0, CUDNN: 1.0}, {FLASH: 0.1, CUDNN: 0.3, EFFICIENT: 1.2}
    seconds = {(LARGE, each): taken for each, taken in of_large.items()}
    seconds |= {(SMALL, each): taken for each, taken in of_small.items()}
    order = order_backends({LARGE: 1, SMALL: 1}, measured(seconds))
    assert order == [CUDNN, FLASH, EFFICIENT, SDPBackend.MATH]
    assert order_backends({LARGE: 1, SMALL: 10}, measured(seconds))[0] is FLASH


def test_kernel_that_does_not_support_a_shape_stays_enabled_behind_the_others() -> None:
    """Where the fastest kernel is not supported, the next one is used: this costs the same for all."""
    seconds = {(LARGE, CUDNN): 1.0, (LARGE, FLASH): 2.0, (SMALL, FLASH): 5.0}
    assert order_backends({LARGE: 1, SMALL: 1}, measured(seconds)) == [CUDNN, FLASH, EFFICIENT, SDPBackend.MATH]
    assert order_backends({LARGE: 1}, measured({})) == []


def test_measurement_of_many_shapes_is_limited_and_starts_with_the_largest() -> None:
    tried: list[AttentionShape] = []
    times = iter([0.0, 0.5, 2.0])

    def measure(shape: AttentionShape, backend: SDPBackend) -> float:
        tried.append(shape)
        return float(backend is EFFICIENT)

    order_backends({SMALL: 1, LARGE: 1}, measure, clock=lambda: next(times))
    assert set(tried) == {LARGE}


def test_names_of_kernels_are_recorded_and_unknown_ones_left_out() -> None:
    assert names_of([CUDNN, SDPBackend.MATH]) == ["cudnn", "math"]
    assert backends_of(["cudnn", "future", "math"]) == [CUDNN, SDPBackend.MATH]
    assert backends_of(None) == []


def test_attention_calls_of_a_pass_are_counted_by_shape(base: Path) -> None:
    method, batch = make_method(base, "LoRA"), make_batch("sd1")
    counts = count_shapes(lambda: method.losses(batch))
    assert {(shape.query[2], shape.key[2]) for shape in counts} == {(16, 16), (16, tiny.NUM_TOKENS)}
    assert all(shape.query[0] == 3 and not shape.has_mask and not shape.is_causal for shape in counts)
    assert len(set(counts.values())) == 1


def tuner(base: Path, data: Path, folder: Path, notes: list[str] | None = None, **training: Any) -> Tuner:
    spec = tiny.make_spec(base, data, **training)
    reporter = Reporter(0, None)
    if notes is not None:
        reporter.note = notes.append  # type: ignore[method-assign, assignment]
    return Tuner(spec, WORLD, JobFolders(folder), folder / "cache", reporter)


class _Batches:
    """Stand-in for a BatchMaker with one batch."""

    @staticmethod
    def make(refs: object) -> Any:
        return make_batch("sd1")


def test_later_attempts_use_the_kernels_of_the_first(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    used: list[list[SDPBackend]] = []
    first, batches = tuner(base, data, tmp_path, notes), _Batches()
    for measure in (
        lambda shape, backend: {FLASH: 2.0, EFFICIENT: 1.0}.get(backend),
        lambda shape, backend: pytest.fail("measured again"),
    ):
        method = make_method(base, "LoRA")
        monkeypatch.setattr(method, "use_attention", used.append)
        first.choose_attention(method, batches, measure)  # type: ignore[arg-type]
    assert used == [[EFFICIENT, FLASH, CUDNN, SDPBackend.MATH]] * 2
    assert notes == ["attention efficient: the fastest kernel for this model on this GPU"]
    assert (tmp_path / ATTENTION_FILE).read_text() == '["efficient", "flash", "cudnn", "math"]'


def test_named_kernel_and_cpus_are_not_measured(base: Path, data: Path, tmp_path: Path) -> None:
    method = make_method(base, "LoRA")
    tuner(base, data, tmp_path).choose_attention(method, _Batches())  # type: ignore[arg-type]
    named = tuner(base, data, tmp_path, attention="math")
    named.choose_attention(method, _Batches(), lambda shape, backend: pytest.fail("measured"))  # type: ignore[arg-type]
    assert not (tmp_path / ATTENTION_FILE).exists()


def test_chosen_kernels_are_used_in_passes_and_in_recomputed_activations(base: Path) -> None:
    """With other kernels, the recomputation would not save the tensors that the backward pass expects."""
    enabled: list[bool] = []
    own = nn.functional.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> Any:
        enabled.append(torch.backends.cuda.flash_sdp_enabled())  # type: ignore[no-untyped-call]
        return own(*args, **kwargs)

    method, plain = (make_method(base, "Full", gradientCheckpointing=True) for _ in range(2))
    method.use_attention([SDPBackend.MATH])
    for each in (method, plain):
        enabled.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn.functional, "scaled_dot_product_attention", spy)
            torch.autograd.backward(each.losses(make_batch("sd1")).sum())
        assert len(enabled) > 4
        assert set(enabled) == {each is plain}


@pytest.mark.parametrize("draws", [True, False])
def test_random_state_is_saved_only_if_activations_are_drawn(monkeypatch: pytest.MonkeyPatch, draws: bool) -> None:
    """Saving it is not possible in a CUDA graph."""
    given: dict[str, Any] = {}

    class Model:
        """Stand-in for a model of transformers."""

        @staticmethod
        def gradient_checkpointing_enable(settings: dict[str, Any]) -> None:
            given.update(settings)

    checkpoint_activations(Model(), draws)
    assert given["preserve_rng_state"] is draws
    assert given["use_reentrant"] is False


def test_damaged_record_is_replaced(tmp_path: Path) -> None:
    kept = KeptChoice(JobFolders(tmp_path), "choice.json", WORLD)
    assert kept.get(lambda: [1]) == [1]
    assert kept.get(lambda: [2]) == [1]
    (tmp_path / "choice.json").write_text("[1")
    assert kept.get(lambda: [3]) == [3]


def training(**settings: Any) -> TrainingSpec:
    return TrainingSpec.model_validate({"method": "Full", "steps": 1, "resolution": 1024, **settings})


OFF = "compile is off because"
LONG = CompileFacts(is_gpu=True, has_compiler=True, num_passes=100_000)


@pytest.mark.parametrize(
    ("settings", "facts", "is_on", "reason"),
    [
        ({"compile": True}, CompileFacts(False, False, 0), True, ""),
        ({"compile": "off"}, LONG, False, ""),
        ({}, LONG, True, "compile is on"),
        ({}, CompileFacts(False, True, 100_000), False, "compile is off because the ranks compute on CPUs"),
        ({}, CompileFacts(True, False, 100_000), False, "compile is off because no C++ compiler is installed"),
        (
            {"method": "LoRA"},
            LONG,
            False,
            "compile is off because the adapters of several layers are computed together",
        ),
        ({"sharding": "full"}, LONG, False, "compile is off because weights are sharded"),
        (
            {},
            CompileFacts(True, True, 600),
            False,
            "compile is off because the remaining 600 passes save less time than it takes",
        ),
        ({}, CompileFacts(True, True, 600, is_cached=True), True, "compile is on"),
        ({}, CompileFacts(True, True, 3000), True, "compile is on"),
        (
            {},
            CompileFacts(True, True, 3000, num_shapes=9),
            False,
            "compile is off because the remaining 3000 passes save less time than it takes",
        ),
    ],
)
def test_blocks_are_compiled_if_enough_passes_remain(
    settings: dict[str, Any], facts: CompileFacts, is_on: bool, reason: str
) -> None:
    assert choose_compile(training(**settings), facts) == (is_on, reason)


def test_compiled_code_is_shared_by_jobs_with_the_same_torch_and_device(tmp_path: Path) -> None:
    env: dict[str, str] = {}
    folder = compiled.use_compile_cache(tmp_path, CPU, env)
    assert folder == tmp_path / "compiled" / compiled.cache_key(CPU) / "inductor"
    assert env == {compiled.INDUCTOR: str(folder), compiled.TRITON: str(folder.parent / "triton")}
    assert torch.__version__ in compiled.cache_key(CPU)
    assert not compiled.is_cached(folder.parent)
    (folder / "fxgraph").mkdir(parents=True)
    assert compiled.is_cached(folder.parent)
    of_torch = {compiled.INDUCTOR: default_cache_dir(), compiled.TRITON: f"{default_cache_dir()}/triton"}
    assert compiled.use_compile_cache(tmp_path, CPU, of_torch) == folder
    assert of_torch == env
    given = {compiled.INDUCTOR: "/mine"}
    assert compiled.use_compile_cache(tmp_path, CPU, given) == Path("/mine")


@pytest.fixture(name="arithmetic")
def _arithmetic() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    kept = (cudnn.benchmark, cudnn.allow_tf32, torch.get_float32_matmul_precision())
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_float32_matmul_precision, kept[2])
        yield
    cudnn.benchmark, cudnn.allow_tf32 = kept[0], kept[1]


@pytest.mark.usefixtures("arithmetic")
def test_fp32_is_exact_and_cudnn_measures_on_gpus_only() -> None:
    cudnn = torch.backends.cudnn
    before = (cudnn.benchmark, cudnn.allow_tf32, torch.get_float32_matmul_precision())
    set_up_gpu(CPU, Precision.BF16)
    assert (cudnn.benchmark, cudnn.allow_tf32, torch.get_float32_matmul_precision()) == before
    set_up_gpu(torch.device("cuda"), Precision.FP32)
    assert (cudnn.benchmark, cudnn.allow_tf32, torch.get_float32_matmul_precision()) == (True, False, "highest")
    set_up_gpu(torch.device("cuda"), Precision.BF16)
    assert (cudnn.benchmark, cudnn.allow_tf32, torch.get_float32_matmul_precision()) == (True, True, "high")


def test_environment_is_unchanged_unless_blocks_are_compiled(base: Path, data: Path, tmp_path: Path) -> None:
    before = dict(os.environ)
    one = tuner(base, data, tmp_path)
    chosen = training(compile="off")
    one.prepare_compiler(chosen, "")
    assert chosen.compile is SwitchMode.OFF
    assert dict(os.environ) == before
