"""Named attention kernels and compiled blocks compute the same as the default ones."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_contract import paths
from finetune_contract.spec import Attention, Sharding
from finetune_trainer.errors import ConfigError
from finetune_trainer.methods.kernels import attention_kernel
from testing.trainer import tiny
from testing.trainer.methods import make_batch, make_method
from testing.trainer.ranks import Ranks
from tests.trainer.checkpoint.test_sharding import done

pytestmark = pytest.mark.trainer

CPU = torch.device("cpu")


@pytest.mark.parametrize("attention", ["flash", "math"])
def test_named_attention_kernel_computes_the_same_loss(base: Path, attention: str) -> None:
    batch = make_batch("sd1")
    plain = make_method(base, "LoRA").losses(batch)
    torch.testing.assert_close(make_method(base, "LoRA", attention=attention).losses(batch), plain)


def test_named_attention_kernel_is_the_only_enabled_one() -> None:
    enabled = {
        Attention.FLASH: torch.backends.cuda.flash_sdp_enabled,
        Attention.MATH: torch.backends.cuda.math_sdp_enabled,
    }
    for attention in enabled:
        with attention_kernel(attention, CPU, torch.float32)():
            assert [name for name, is_enabled in enabled.items() if is_enabled()] == [attention]  # type: ignore[no-untyped-call]


def test_unavailable_attention_kernel_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"training\.attention: efficient is not available on cpu with float32; write auto"
    ):
        attention_kernel(Attention.EFFICIENT, CPU, torch.float32)


def test_compiled_blocks_have_the_same_gradients(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses torch's tracer without its code generator, which takes half a minute."""
    compiled: list[str] = []
    own = torch.nn.Module.compile

    def traced(module: torch.nn.Module) -> None:
        compiled.append(type(module).__name__)
        own(module, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    batch = make_batch("sd1")
    plain, compiled_method = make_method(base, "LoRA"), make_method(base, "LoRA", compile=True)
    assert set(compiled) == {"BasicTransformerBlock"}
    for method in (plain, compiled_method):
        method.losses(batch).sum().backward()  # type: ignore[no-untyped-call]
    gradients = [[p.grad for p in method.parameters().values()] for method in (plain, compiled_method)]
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        torch.testing.assert_close(one, other)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with g++, which is not installed")
@pytest.mark.parametrize(("training", "world_size"), [({}, 1), ({"method": "Full", "sharding": Sharding.FULL}, 2)])
def test_run_with_compiled_blocks_has_the_same_losses_and_its_successor_compiles_nothing(
    base: Path, data: Path, tmp_path: Path, training: dict[str, Any], world_size: int
) -> None:
    """Uses torch's code generator and the compiler of this machine, which writes down its calls."""
    calls = log_calls_of_compiler(tmp_path)
    runs, num_calls = [], []
    for number, compiles in enumerate((False, True, True)[: 3 if world_size == 1 else 2]):
        spec = tiny.make_spec(base, data, steps=3, compile=compiles, **training)
        path = f"{calls.parent}:{os.environ['PATH']}"
        variables = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "PATH": path}
        runs.append(done(Ranks(spec, tmp_path / f"run-{number}", world_size=world_size, extra=variables)))
        num_calls.append(calls.read_text(encoding="utf-8").count("-shared") if calls.is_file() else 0)
    assert list((tmp_path / "cache" / "compiled").rglob("*.so")), runs[1].stderr()
    assert num_calls[0] == 0
    assert num_calls[-1] == num_calls[1] > 0
    plain, compiled = (losses(run) for run in runs[:2])
    assert len(plain) == 3
    assert compiled == pytest.approx(plain, rel=1e-4)
    assert losses(runs[-1]) == compiled


def log_calls_of_compiler(folder: Path) -> Path:
    """Write a g++ that appends its arguments to a file and runs the real one; return the file, next to it."""
    script, log = folder / "bin" / "g++", folder / "bin" / "calls"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\necho "$*" >> {log}\nexec {shutil.which("g++")} "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    return log


def losses(run: Ranks) -> list[float]:
    """Return the loss of each step from the last checkpoint."""
    newest = max(paths.checkpoints(run.job_dir).glob("step-*"))
    values: dict[str, list[float]] = json.loads((newest / "state.json").read_text(encoding="utf-8"))
    return values["losses"]
