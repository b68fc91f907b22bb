"""Packed convolutions compute the same as the plain ones, and are used only if nothing else reads the weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune_trainer.methods.packed_conv import pack_convolutions
from testing.trainer.methods import make_batch, make_method

pytestmark = pytest.mark.trainer


def both_passes(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    (y.float() * torch.arange(y.numel()).view_as(y)).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize(("kernel", "padding", "bias"), [(3, 1, True), (2, 0, False), (3, 0, True), (5, 2, True)])
def test_packed_layer_has_the_outputs_and_gradients_of_the_plain_layer(kernel: int, padding: int, bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(24, 40, kernel, padding=padding, bias=bias).to(torch.bfloat16).requires_grad_(False)
    packed = copy.deepcopy(plain)
    assert pack_convolutions(packed) == 1
    x = torch.randn(2, 24, 9, 7).to(torch.bfloat16)
    for one, other in zip(both_passes(plain, x), both_passes(packed, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1.6e-2, atol=1e-3 * float(one.abs().max()))


def test_trained_and_unsupported_layers_are_not_packed() -> None:
    layers = nn.ModuleList(
        [
            nn.Conv2d(4, 4, 3).to(torch.bfloat16),
            nn.Conv2d(4, 4, 3).requires_grad_(False),
            nn.Conv2d(4, 4, 3).to(torch.float16).requires_grad_(False),
            nn.Conv2d(4, 4, 3, stride=2).to(torch.bfloat16).requires_grad_(False),
            nn.Conv2d(4, 4, 3, groups=2).to(torch.bfloat16).requires_grad_(False),
            nn.Conv2d(4, 4, 3, padding=3).to(torch.bfloat16).requires_grad_(False),
            nn.Conv2d(4, 4, 1).to(torch.bfloat16).requires_grad_(False),
        ]
    )
    assert pack_convolutions(layers) == 0


def count_packed(method: Any) -> int:
    """Return the number of convolutions of the denoiser whose plain weights were freed."""
    return sum(isinstance(layer, nn.Conv2d) and layer.weight.numel() == 0 for layer in method._denoiser.modules())


@pytest.mark.parametrize("name", ["LoRA", "TextualInversion", "ControlNet"])
def test_methods_with_a_frozen_denoiser_have_the_same_gradients(
    name: str, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_batch("sd1", caption="<cat>")
    packed = make_method(base, name, torch.bfloat16)
    with monkeypatch.context() as patch:
        patch.setattr("finetune_trainer.methods.denoiser_method.pack_convolutions", lambda _: 0)
        plain = make_method(base, name, torch.bfloat16)
    assert [count_packed(method) > 0 for method in (plain, packed)] == [False, True]
    for method in (plain, packed):
        method.losses(batch).sum().backward()  # type: ignore[no-untyped-call]
    assert any(leaf.grad is not None and leaf.grad.any() for leaf in plain.leaves())
    for plain_leaf, packed_leaf in zip(plain.leaves(), packed.leaves(), strict=True):
        expected, found = plain_leaf.grad, packed_leaf.grad
        if expected is None:
            assert found is None
            continue
        assert found is not None
        torch.testing.assert_close(found, expected, rtol=0.1, atol=0.02 * float(expected.abs().max()) + 1e-6)
