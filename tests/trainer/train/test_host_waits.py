"""A step waits for the device once: where it reads the loss and the norm of the gradients.

On CPUs nothing has to be waited for, so the tests count the operations that would wait on a GPU.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from finetune_contract.exit_codes import ExitCode
from finetune_trainer.optim.adafactor import Adafactor
from finetune_trainer.optim.prodigy import Prodigy
from finetune_trainer.report import Reporter
from finetune_trainer.train import storage
from finetune_trainer.train.context import RankContext
from finetune_trainer.train.loop import Loop, StepResult
from finetune_trainer.train.preemption_notice import PreemptionNotice
from finetune_trainer.train.run import run_rank
from finetune_trainer.transfers import to_device
from testing.trainer import tiny
from testing.trainer.methods import SETTINGS

pytestmark = pytest.mark.trainer

_READS = ("tolist", "numpy", "cpu")
"""Methods of tensors that copy values to the host. The others read a number, which is an operation."""
_OPERATIONS = {
    "_local_scalar_dense",
    "_unique2",
    "allclose",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
}
"""Operations whose result, or its size, the host reads."""


class HostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in _OPERATIONS or (name.startswith("index") and _has_mask(args)):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def _has_mask(args: tuple[Any, ...]) -> bool:
    indices = [each for arg in args if isinstance(arg, list | tuple) for each in arg]
    return any(isinstance(each, Tensor) and each.dtype is torch.bool for each in indices)


@pytest.fixture(name="reads")
def _reads(monkeypatch: pytest.MonkeyPatch) -> HostReads:
    reads = HostReads()
    for name in _READS:
        method = getattr(Tensor, name)

        @functools.wraps(method)
        def counted(*args: Any, method: Callable[..., Any] = method, **kwargs: Any) -> Any:
            if torch.utils._python_dispatch._get_current_dispatch_mode() is reads:
                reads.counts[method.__name__] += 1
            return method(*args, **kwargs)

        monkeypatch.setattr(Tensor, name, counted)
    return reads


@pytest.fixture(name="run")
def _run(base: Path, data: Path, tmp_path: Path) -> Callable[..., None]:
    """Return a function that trains with the given settings."""

    def run(**training: Any) -> None:
        spec = tiny.make_spec(base, data, **training)
        reporter = Reporter(0, None)
        context = RankContext(spec, 1, tmp_path / "job", tmp_path / "cache", PreemptionNotice(), reporter)
        assert run_rank(context, {"OMP_NUM_THREADS": "1"}) is ExitCode.DONE

    return run


def test_every_kind_of_read_is_counted(reads: HostReads) -> None:
    values = torch.arange(3.0)
    with reads:
        assert [values.tolist(), values[1].item(), float(values[2]), bool(values[0])] == [
            [0.0, 1.0, 2.0],
            1.0,
            2.0,
            False,
        ]
        assert len(values[values > 0]) == 2
        assert values.nonzero().numel() == 2
        assert values.cpu() is values
        values[torch.tensor([0, 1])] = 1.0
    assert values.tolist() == [1, 1, 2]
    assert reads.counts == {"tolist": 1, "_local_scalar_dense": 3, "index": 1, "nonzero": 1, "cpu": 1}


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("LoRA", {"optimizer": "adamw"}),
        ("LoRA", {"optimizer": "prodigy", "learningRate": 1}),
        ("DreamBooth, text", {"precision": "bf16", "ema": True, "textEncoderLearningRate": 1e-3}),
        ("Full", {"precision": "fp16", "snrGamma": 5.0}),
        ("Full", {"precision": "bf16", "weightPrecision": "bf16", "optimizer": "adafactor", "ema": True}),
        ("ControlNet", {"precision": "bf16", "maxGradNorm": 1e-3, "optimizer": "adafactor"}),
        ("TextualInversion", {}),
    ],
)
def test_a_step_reads_values_of_the_device_once(
    run: Callable[..., None], reads: HostReads, monkeypatch: pytest.MonkeyPatch, name: str, settings: dict[str, Any]
) -> None:
    """Weights are stored, and optimizers compute, as on a GPU."""
    monkeypatch.setattr(storage, "uses_flat_tensors", lambda _: True)
    for optimizer in (Prodigy, Adafactor):
        monkeypatch.setattr(optimizer, "step", on_gpu(optimizer.step))
    found: list[Counter[str]] = []
    train_step = Loop.train_step

    def watched(loop: Loop) -> StepResult:
        with reads:
            result = train_step(loop)
        found.append(Counter(reads.counts))
        reads.counts.clear()
        return result

    monkeypatch.setattr(Loop, "train_step", watched)
    run(**{**SETTINGS[name], "steps": 3, "centerCrop": True, **settings})
    # A checkpoint restored before the first step may be read in it.
    assert found[1:] == [{"tolist": 1}] * 2


def on_gpu(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return an optimizer's step for which all weights are on a GPU."""

    def run(*args: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn.Parameter, "is_cpu", False, raising=False)
            return step(*args)

    return run


class PinnedTensor:
    """A host tensor that records how it is copied to a GPU."""

    is_cpu = True
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.calls: list[str] = []

    def pin_memory(self) -> PinnedTensor:
        self.calls.append("pin")
        return self

    def to(self, device: torch.device, non_blocking: bool = False) -> PinnedTensor:
        self.calls.append(f"{device} {'without' if non_blocking else 'with'} a wait")
        return self


def test_copies_to_a_gpu_do_not_wait() -> None:
    tensor: Any = PinnedTensor()
    to_device(tensor, torch.device("cuda", 1))
    assert tensor.calls == ["pin", "cuda:1 without a wait"]
    own = torch.ones(2)
    assert to_device(own, torch.device("cpu")) is own
