"""Fused operations: the results and gradients of diffusers' modules, and Triton's kernels in its interpreter."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from finetune_trainer.fused import operations
from finetune_trainer.fused.blocks import (
    fuse_feed_forward,
    fuse_residual_blocks,
    fuse_transformer_blocks,
    use_fused_operations,
)
from finetune_trainer.fused.functions import add_layer_norm, geglu
from testing.trainer import tiny


def assert_close(found: Tensor, expected: Tensor, atol: float = 1e-6) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=atol)


class FusedCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the project's own operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "finetune":
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_kernels_compute_what_torch_computes() -> None:
    """Triton's interpreter runs the kernels that a GPU runs."""
    pytest.importorskip("triton")
    code = (
        "import torch; from finetune_trainer.fused.operations import check_kernels; cpu = torch.device('cpu'); "
        "print(check_kernels(cpu, torch.float32), check_kernels(cpu, torch.bfloat16))"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    exact, rounded = map(float, done.stdout.split()[-2:])
    assert exact < 1e-5
    assert exact < rounded < 2e-2


@pytest.fixture(name="check", params=["fails", "differs", "has no numbers"])
def _check(request: pytest.FixtureRequest) -> Callable[..., float]:
    def fail(*_: Any) -> float:
        raise RuntimeError("no compiler")

    return fail if request.param == "fails" else lambda *_: 0.5 if request.param == "differs" else math.nan


@pytest.fixture(name="forget")
def _forget() -> Iterator[None]:
    operations.triton_works.cache_clear()
    yield
    operations.triton_works.cache_clear()


@pytest.mark.usefixtures("forget")
def test_without_working_kernels_torch_computes(
    check: Callable[..., float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(operations, "check_kernels", check)
    with caplog.at_level(logging.WARNING):
        assert not operations.triton_works(torch.float32)
    assert "fused kernels are off" in caplog.text
    x = torch.randn(3, 8)
    assert torch.equal(operations._on_gpu("geglu")(x), operations.geglu(x))


def test_geglu_saves_only_its_input() -> None:
    layer = GEGLU(6, 10)
    x = torch.randn(2, 3, 6, requires_grad=True)
    expected = layer(x)
    gradient = torch.randn_like(expected)
    (reference,) = torch.autograd.grad(expected, x, gradient)
    projected = layer.proj(x)
    saved: list[Tensor] = []

    def save(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        y = geglu(projected)
    assert [tensor.data_ptr() for tensor in saved] == [projected.data_ptr()]
    assert_close(y, expected)
    assert_close(torch.autograd.grad(y, x, gradient)[0], reference)


@pytest.mark.parametrize("used", ["both", "sum", "norm"])
@pytest.mark.parametrize("with_added", [False, True])
@pytest.mark.parametrize("added_dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_of_a_sum(used: str, with_added: bool, added_dtype: torch.dtype) -> None:
    norm = nn.LayerNorm(6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.requires_grad_(False)
    x = torch.randn(2, 3, 6, requires_grad=True)
    added = torch.randn(2, 3, 6, dtype=added_dtype).requires_grad_() if with_added else None

    def loss(total: Tensor, normed: Tensor) -> Tensor:
        parts = {"sum": total.square().sum(), "norm": normed.pow(3).sum()}
        return sum((parts[name] for name in parts if used in {name, "both"}), torch.zeros(()))

    total = x if added is None else x + added
    inputs = [x] if added is None else [x, added]
    expected = torch.autograd.grad(loss(total, norm(total)), inputs)
    found = torch.autograd.grad(loss(*add_layer_norm(x, added, norm)), inputs)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, atol=1e-5)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("time_is_trained", [False, True])
def test_residual_block(channels_last: bool, time_is_trained: bool) -> None:
    torch.manual_seed(0)
    plain, fused = (ResnetBlock2D(in_channels=8, out_channels=12, temb_channels=5, groups=4) for _ in range(2))
    fused.load_state_dict(plain.state_dict())
    for block in (plain, fused):
        block.requires_grad_(False)
    fuse_residual_blocks(fused)
    x, time = torch.randn(2, 8, 5, 7), torch.randn(2, 5).requires_grad_(time_is_trained)
    x = x.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format).requires_grad_()
    inputs = [x, time] if time_is_trained else [x]
    expected, found = plain(x, time), fused(x, time)
    assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        assert_close(one, other, atol=1e-5)


def test_time_is_projected_again_when_it_changes() -> None:
    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=8, temb_channels=5, groups=4).requires_grad_(False)
    x, first, second = torch.randn(1, 8, 4, 4), torch.randn(1, 5), torch.randn(1, 5)
    expected = [block(x, time) for time in (first, second, first)]
    fuse_residual_blocks(block)
    for time, reference in zip((first, second, first), expected, strict=True):
        assert_close(block(x, time), reference)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_denoiser(family: str, checkpointing: bool, tmp_path: Path) -> None:
    """A frozen denoiser has the same output, and its text the same gradient."""
    folder = tiny.write_base(tmp_path / "base", family=family) / "unet"
    results = []
    for is_fused in (False, True):
        unet = UNet2DConditionModel.from_pretrained(folder).requires_grad_(False).train()
        if is_fused:
            fuse_feed_forward(unet)
            fuse_transformer_blocks(unet)
            fuse_residual_blocks(unet)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        torch.manual_seed(0)
        text = torch.randn(2, 5, unet.config.cross_attention_dim, requires_grad=True)
        conditions = {}
        if unet.config.addition_embed_type == "text_time":
            width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
            conditions = {"text_embeds": torch.randn(2, width), "time_ids": torch.full((2, 6), 16.0)}
        counter = FusedCounter()
        with counter:
            output = unet(torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), text, added_cond_kwargs=conditions).sample
            (gradient,) = torch.autograd.grad(output.square().sum(), text)
        assert set(counter.counts) == (set(operations._TORCH) if is_fused else set())
        results.append((output.detach(), gradient))
    (expected, reference), (found, gradient) = results
    assert_close(found, expected)
    torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5)


def test_trained_norms_and_cpus_keep_their_own_operations(base: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    fuse_transformer_blocks(unet)
    fuse_residual_blocks(unet)
    use_fused_operations(unet.requires_grad_(False), has_compiled_blocks=False)
    assert not any("forward" in vars(module) for module in unet.modules())


def test_operations_of_compiled_blocks_are_left_to_the_compiler(base: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(base / "unet").requires_grad_(False).to("meta")
    use_fused_operations(unet, has_compiled_blocks=True)
    assert {type(module) for module in unet.modules() if "forward" in vars(module)} == {ResnetBlock2D}
    use_fused_operations(unet, has_compiled_blocks=False)
    changed = {type(module) for module in unet.modules() if "forward" in vars(module)}
    assert changed == {ResnetBlock2D, BasicTransformerBlock, GEGLU}
