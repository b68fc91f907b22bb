"""Every method trains with IPEX, on one and two ranks, resumes bit-identically and agrees with native torch.

`make test-intel` runs these tests in an environment with IPEX. Native jobs run first: the import of IPEX changes
operations of torch in the whole process.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_contract import environment
from finetune_contract.cpu.spec import CpuSpec
from finetune_contract.exit_codes import ExitCode
from finetune_contract.run_spec import RunSpec
from finetune_contract.spec import SwitchMode

pytestmark = [pytest.mark.trainer, pytest.mark.ipex]

STEPS = 4
METHODS = ("LoRA", "LoRA, text", "Full", "DreamBooth, text", "DreamBoothLoRA", "TextualInversion", "ControlNet")
OPTIONS: dict[str, Any] = {"steps": STEPS, "precision": "bf16", "captionDropout": 0.3, "snrGamma": 5}
PRELOADED = ["testing.trainer.ranks_preload", "intel_extension_for_pytorch"]


def make_spec(base: Path, data: Path, method: str, ipex: SwitchMode, **options: Any) -> RunSpec:
    from testing.trainer import tiny  # noqa: PLC0415  slow to import
    from testing.trainer.methods import SETTINGS  # noqa: PLC0415

    spec = tiny.make_spec(base, data, **{**OPTIONS, **options}, **SETTINGS[method])
    return spec.model_copy(update={"cpu": CpuSpec(ipex=ipex)})


def run_here(spec: RunSpec, job_dir: Path, attempt: int = 1) -> ExitCode:
    """Run one rank in this process."""
    from finetune_trainer.report import Reporter  # noqa: PLC0415  slow to import
    from finetune_trainer.train.context import RankContext  # noqa: PLC0415
    from finetune_trainer.train.preemption_notice import PreemptionNotice  # noqa: PLC0415
    from finetune_trainer.train.run import run_rank  # noqa: PLC0415

    context = RankContext(spec, attempt, job_dir, job_dir.parent / "cache", PreemptionNotice(), Reporter(0, None))
    return run_rank(context, {"OMP_NUM_THREADS": "1"})


def read_outputs(job_dir: Path) -> dict[str, bytes]:
    folder = job_dir / "outputs"
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}
    assert found
    return found


def copy_half(job_dir: Path, target: Path) -> Path:
    """Copy a job as it was after half of its steps."""
    ignored = shutil.ignore_patterns("outputs", "exports", f"step-{STEPS:08d}-*")
    shutil.copytree(job_dir, target, ignore=ignored)
    return target


def read_weights(job_dir: Path) -> Any:
    """Return all trained weights of the last checkpoint as one vector, fp32."""
    import torch  # noqa: PLC0415  slow to import
    from safetensors.torch import load_file  # noqa: PLC0415

    (file,) = (job_dir / "checkpoints").glob(f"step-{STEPS:08d}-*/model.safetensors")
    tensors = load_file(file)
    assert all(tensor.dtype is torch.float32 for tensor in tensors.values())
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def distance(first: Path, second: Path) -> float:
    """Return the distance of the weights of two jobs."""
    return float((read_weights(first) - read_weights(second)).norm())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("intel")


@pytest.fixture(scope="module", autouse=True)
def _restored_settings() -> Iterator[None]:
    """Undo the torch settings that a rank in this process changes."""
    yield
    import torch  # noqa: PLC0415  slow to import

    torch.use_deterministic_algorithms(False)
    gc.unfreeze()


@pytest.fixture(scope="module")
def native(base: Path, data: Path, folder: Path) -> dict[tuple[str, str], Path]:
    """Return the jobs of all methods without IPEX, by method and precision."""
    found = {}
    for method, precision in itertools.product(METHODS, ("bf16", "fp32")):
        found[method, precision] = folder / f"{method}-{precision}"
        spec = make_spec(base, data, method, SwitchMode.OFF, precision=precision)
        assert run_here(spec, found[method, precision]) is ExitCode.DONE
    assert "intel_extension_for_pytorch" not in sys.modules
    return found


@pytest.fixture(scope="module")
def optimized(base: Path, data: Path, folder: Path, native: dict[tuple[str, str], Path]) -> dict[str, Path]:
    """Return the jobs of all methods with IPEX on one rank."""
    del native
    found = {}
    for method in METHODS:
        found[method] = folder / f"{method}-one"
        assert run_here(make_spec(base, data, method, SwitchMode.ON), found[method]) is ExitCode.DONE
    return found


@pytest.fixture(scope="module")
def on_two(base: Path, data: Path, folder: Path) -> dict[str, Path]:
    """Return the jobs of all methods with IPEX on two ranks."""
    ranks = importlib.import_module("testing.trainer.ranks")
    ranks._CONTEXT.set_forkserver_preload(PRELOADED)
    found = {}
    for method in METHODS:
        job = ranks.Ranks(make_spec(base, data, method, SwitchMode.ON), folder / f"{method}-two", world_size=2)
        assert job.run() == [ExitCode.DONE] * 2, job.stderr()
        found[method] = job.folder
    return found


@pytest.mark.parametrize("method", METHODS)
def test_a_job_agrees_with_native_torch_within_the_error_of_bf16(
    method: str, native: dict[tuple[str, str], Path], optimized: dict[str, Path]
) -> None:
    error_of_bf16 = distance(native[method, "bf16"], native[method, "fp32"])
    assert distance(optimized[method], native[method, "bf16"]) <= 1.5 * error_of_bf16


@pytest.mark.parametrize("method", METHODS)
def test_a_job_on_two_ranks_agrees_with_native_torch_within_the_error_of_bf16(
    method: str, native: dict[tuple[str, str], Path], on_two: dict[str, Path]
) -> None:
    error_of_bf16 = distance(native[method, "bf16"], native[method, "fp32"])
    assert distance(on_two[method] / "job", native[method, "bf16"]) <= 1.5 * error_of_bf16


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_job_writes_the_same_bytes(
    method: str, base: Path, data: Path, folder: Path, optimized: dict[str, Path]
) -> None:
    resumed = copy_half(optimized[method], folder / f"{method}-resumed")
    assert run_here(make_spec(base, data, method, SwitchMode.ON), resumed, attempt=2) is ExitCode.DONE
    assert read_outputs(resumed) == read_outputs(optimized[method])


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_job_on_two_ranks_writes_the_same_bytes(
    method: str, base: Path, data: Path, folder: Path, on_two: dict[str, Path]
) -> None:
    ranks = importlib.import_module("testing.trainer.ranks")
    target = folder / f"{method}-two-resumed"
    copy_half(on_two[method] / "job", target / "job")
    job = ranks.Ranks(make_spec(base, data, method, SwitchMode.ON), target, 2, 2)
    assert job.run() == [ExitCode.DONE] * 2, job.stderr()
    assert job.reports()[-1]["restoredStep"] == STEPS // 2
    assert read_outputs(target / "job") == read_outputs(on_two[method] / "job")


def test_a_job_continues_without_ipex(
    base: Path, data: Path, folder: Path, native: dict[tuple[str, str], Path], optimized: dict[str, Path]
) -> None:
    moved = copy_half(optimized["Full"], folder / "moved")
    assert run_here(make_spec(base, data, "Full", SwitchMode.OFF), moved, attempt=2) is ExitCode.DONE
    error_of_bf16 = distance(native["Full", "bf16"], native["Full", "fp32"])
    assert distance(moved, native["Full", "bf16"]) <= 1.5 * error_of_bf16


LAYERS = {
    "LoRA": (51, 0),
    "Full": (0, 83),
    "TextualInversion": (89, 0),
    "ControlNet": (83, 50),
}
"""Frozen and trained layers of the tiny models that IPEX computes. Those with an adapter are left to it."""


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("method", LAYERS)
def test_layers_and_gradients(
    method: str, precision: str, base: Path, caplog: pytest.LogCaptureFixture, optimized: dict[str, Path]
) -> None:
    del optimized  # the native jobs have run
    caplog.set_level("INFO", logger="finetune_trainer.intel")
    gradients = [gradients_of(base, method, precision, uses_ipex) for uses_ipex in (False, True)]
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("finetune_trainer.intel")]
    numbers = [int(message.split()[2]) for message in messages]
    frozen, trained = LAYERS[method]
    assert sum(numbers) == frozen + trained
    tolerance = 0.02 if precision == "bf16" else 1e-4
    assert (gradients[0] - gradients[1]).norm() <= tolerance * gradients[0].norm()
    assert gradients[0].norm() > 0


def gradients_of(base: Path, method: str, precision: str, uses_ipex: bool) -> Any:
    """Return all gradients of a method in the first step as one vector."""
    import torch  # noqa: PLC0415  slow to import

    from finetune_contract.input_spec import ModelSpec  # noqa: PLC0415
    from finetune_contract.spec import TrainingSpec  # noqa: PLC0415
    from finetune_trainer.data.sampling.draws import Draws  # noqa: PLC0415
    from finetune_trainer.methods.method import MethodContext  # noqa: PLC0415
    from finetune_trainer.methods.registry import method_class  # noqa: PLC0415
    from finetune_trainer.models.base import open_base  # noqa: PLC0415
    from testing.trainer.methods import CPU, SETTINGS, make_batch  # noqa: PLC0415

    spec = TrainingSpec.model_validate(SETTINGS[method])
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    family = open_base(ModelSpec(base=str(base)))
    made = method_class(spec.method)(MethodContext(family, spec, Draws(0), CPU, dtype, uses_ipex=uses_ipex))
    made.refresh()
    leaves = made.leaves()
    loss = made.losses(made.prepare(make_batch("sd1", caption="a <cat>"))).sum()
    return torch.cat([gradient.float().flatten() for gradient in torch.autograd.grad(loss, list(leaves))])


def test_a_process_that_has_imported_ipex_can_be_forked(base: Path, data: Path, tmp_path: Path) -> None:
    spec = make_spec(base, data, "LoRA", SwitchMode.ON)
    (tmp_path / "run.json").write_text(spec.to_json(), encoding="utf-8")
    program = (
        "import os, sys; from finetune_trainer import libraries; libraries.prepare(os.environ); libraries.preload();"
        "assert libraries.IPEX in sys.modules; from finetune_trainer.supervisor import fork_safety;"
        "assert not fork_safety.list_threads(), fork_safety.list_threads()"
    )
    env = {**os.environ, environment.RUN_SPEC: str(tmp_path / "run.json")}
    subprocess.run([sys.executable, "-c", program], env=env, check=True)


def test_the_gradients_of_group_norms_may_have_another_layout_than_their_inputs(tmp_path: Path) -> None:
    """The lowest level of these latents is 1 x 1, where the layouts of inputs and gradients differ."""
    from finetune_contract.spec import Precision  # noqa: PLC0415  slow to import
    from finetune_trainer.distributed.world import World  # noqa: PLC0415
    from finetune_trainer.intel.paths import ComputePath  # noqa: PLC0415
    from testing.measure.cpu_step import CPU, CpuStep, NarrowFamily, StepSettings  # noqa: PLC0415

    settings = StepSettings("Full", ComputePath(Precision.FP32, True), 2, 64)
    assert CpuStep(NarrowFamily(32, tmp_path), settings, World(0, 1, 0, CPU)).run() > 0


CONVOLUTIONS: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    # On processors with AMX, the layout for 16 x 16 differs from the one that IPEX packs without knowing the shape.
    "plain": ({"in_channels": 384, "out_channels": 384, "kernel_size": 3, "padding": 1}, (16, 4)),
    "strided, without bias": (
        {"in_channels": 96, "out_channels": 192, "kernel_size": 3, "stride": 2, "padding": 1, "bias": False},
        (32, 12),
    ),
}


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("is_trained", [True, False])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_is_packed_in_the_layout_that_its_input_needs(
    name: str, is_trained: bool, precision: str, optimized: dict[str, Path]
) -> None:
    del optimized  # the native jobs have run
    import torch  # noqa: PLC0415  slow to import
    from torch import nn  # noqa: PLC0415

    from finetune_trainer.intel.layers import TrainedLayers, optimize_frozen  # noqa: PLC0415

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    options, sides = CONVOLUTIONS[name]
    torch.manual_seed(0)
    plain: Any = nn.Sequential(nn.Conv2d(**options, dtype=dtype)).to(memory_format=torch.channels_last)
    plain.requires_grad_(is_trained)
    packed: Any = nn.Sequential(nn.Conv2d(**options, dtype=dtype)).to(memory_format=torch.channels_last)
    packed.requires_grad_(is_trained)
    packed.load_state_dict(plain.state_dict())
    trained = TrainedLayers([packed])
    assert len(trained) == is_trained
    assert optimize_frozen(packed) == (not is_trained)
    layer: Any = trained._packed[0] if is_trained else packed[0]
    tolerance = 0.02 if precision == "bf16" else 1e-4
    for side in (*sides, sides[0]):
        x = torch.randn(2, plain[0].in_channels, side, side).to(dtype, memory_format=torch.channels_last)
        results = [_call(module, x) for module in (plain, packed)]
        for expected, found in zip(*results, strict=True):
            assert (found - expected).norm() <= tolerance * expected.norm()
        counterpart = layer._layouts.of(x.shape)
        assert torch.equal(counterpart.ctx.get_weight(), _pack(plain[0], x))
        # Trained weights change, and both copies follow.
        if is_trained:
            for parameters in zip(plain.parameters(), packed.parameters(), strict=True):
                for parameter in parameters:
                    parameter.data.mul_(1.5)
            trained.refresh()
    layouts = [_pack(plain[0], torch.zeros(2, plain[0].in_channels, side, side, dtype=dtype)) for side in sides]
    assert len(layer._layouts.counterparts) == 1 + (not torch.equal(*layouts))


def _call(module: Any, x: Any) -> list[Any]:
    """Return the output and all gradients of a module."""
    import torch  # noqa: PLC0415  slow to import

    x = x.detach().requires_grad_()
    output = module(x)
    inputs = [x, *(parameter for parameter in module.parameters() if parameter.requires_grad)]
    return [output.detach(), *torch.autograd.grad(output, inputs, torch.ones_like(output))]


def _pack(layer: Any, x: Any) -> Any:
    """Return the weight of a convolution in the layout that IPEX chooses for an input."""
    import torch  # noqa: PLC0415  slow to import

    weight = layer.weight.detach().clone(memory_format=torch.channels_last)
    settings = (layer.stride, layer.padding, layer.dilation, layer.groups, True, list(x.shape))
    return torch.ops.ipex_prepack.convolution_prepack(weight, layer.bias, *settings).get_weight()


def test_trained_layers_compute_with_their_present_weights(optimized: dict[str, Path]) -> None:
    del optimized  # the native jobs have run
    import torch  # noqa: PLC0415  slow to import
    from torch import nn  # noqa: PLC0415

    from finetune_trainer.intel.layers import TrainedLayers  # noqa: PLC0415

    cases: list[tuple[Any, Any]] = [
        (nn.Linear(32, 48), torch.randn(4, 32)),
        (nn.Conv2d(16, 32, 3), torch.randn(2, 16, 8, 8)),
    ]
    for layer, x in cases:
        module: Any = nn.Sequential(layer)
        trained = TrainedLayers([module])
        module(x)
        with torch.no_grad():
            layer.weight.mul_(2)
            layer.bias.add_(3)
        trained.refresh()
        expected = type(layer).forward(layer, x)
        assert torch.allclose(module(x), expected, atol=1e-4)
