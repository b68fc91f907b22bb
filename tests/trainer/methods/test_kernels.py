"""Named attention kernels and compiled blocks compute the same as the default ones."""

from __future__ import annotations

import json
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
def test_run_with_compiled_blocks_has_the_same_losses(
    base: Path, data: Path, tmp_path: Path, training: dict[str, Any], world_size: int
) -> None:
    """Uses torch's code generator and the compiler of this machine."""
    runs = []
    for compiles in (False, True):
        spec = tiny.make_spec(base, data, steps=3, compile=compiles, **training)
        variables = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "kernels"), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        folder = tmp_path / str(compiles) / "job"
        runs.append(done(Ranks(spec, folder, world_size=world_size, extra=variables)))
    assert list((tmp_path / "kernels").rglob("*.so")), runs[1].stderr()
    plain, compiled = (losses(run) for run in runs)
    assert len(plain) == 3
    assert compiled == pytest.approx(plain, rel=1e-4)


def losses(run: Ranks) -> list[float]:
    """Return the loss of each step from the last checkpoint."""
    newest = max(paths.checkpoints(run.job_dir).glob("step-*"))
    values: dict[str, list[float]] = json.loads((newest / "state.json").read_text(encoding="utf-8"))
    return values["losses"]
