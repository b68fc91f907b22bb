"""Named attention kernels and compiled blocks give what the plain ones give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finetune_contract.spec import Attention
from finetune_trainer.errors import ConfigError
from finetune_trainer.methods.kernels import attention_kernel, compile_blocks
from tests.trainer.methods import make_batch, make_method

pytestmark = pytest.mark.trainer

CPU = torch.device("cpu")


@pytest.mark.parametrize("attention", ["flash", "math"])
def test_named_kernels_compute_the_same(base: Path, attention: str) -> None:
    batch = make_batch("sd1")
    plain = make_method(base, "LoRA").losses(batch)
    torch.testing.assert_close(make_method(base, "LoRA", attention=attention).losses(batch), plain)


def test_a_kernel_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"training\.attention: efficient is not there on cpu in float32; write auto"):
        attention_kernel(Attention.EFFICIENT, CPU, torch.float32)


def test_compiled_blocks_train_as_the_plain_ones_do(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through torch's tracer, and without its code generator, which takes half a minute."""
    compiled: list[str] = []
    own = torch.nn.Module.compile

    def traced(module: torch.nn.Module) -> None:
        compiled.append(type(module).__name__)
        own(module, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    batch = make_batch("sd1")
    plain, traced_too = make_method(base, "LoRA"), make_method(base, "LoRA", compile=True)
    assert set(compiled) == {"BasicTransformerBlock"}
    for method in (plain, traced_too):
        method.losses(batch).sum().backward()  # type: ignore[no-untyped-call]
    gradients = [[p.grad for p in method.parameters().values()] for method in (plain, traced_too)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_without_a_compiler_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=r"training\.compile: needs a C\+\+ compiler"):
        compile_blocks(torch.nn.Linear(1, 1))
