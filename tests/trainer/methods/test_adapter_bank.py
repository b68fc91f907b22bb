"""Adapters in flat storage: the losses and gradients of peft, in every kind of pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune_contract.input_spec import ModelSpec
from finetune_contract.spec import TrainingSpec
from finetune_trainer.data.batches import Batch
from finetune_trainer.data.sampling.draws import Draws
from finetune_trainer.methods.adapted_attention import AdaptedAttentionProcessor
from finetune_trainer.methods.lora import Lora
from finetune_trainer.methods.method import MethodContext
from finetune_trainer.models.base import open_base
from finetune_trainer.models.family import IMAGE_SIZES
from testing.trainer import tiny

CPU = torch.device("cpu")
ALMOST_NO_DROPOUT = 1e-9
"""Keeps peft's own layers, and drops nothing."""


@pytest.fixture(name="family_base", scope="module", params=tiny.FAMILIES)
def _family_base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_base(tmp_path_factory.mktemp("base") / "base", family=request.param)


def make_lora(base: Path, dropout: float = 0.0, dtype: torch.dtype = torch.float32, **training: Any) -> Lora:
    settings = {"lora": {"rank": 3, "alpha": 6, "dropout": dropout}} | training
    spec = TrainingSpec.model_validate({"method": "LoRA", **settings})
    made = Lora(MethodContext(open_base(ModelSpec(base=str(base))), spec, Draws(0), CPU, dtype))
    torch.manual_seed(0)
    for parameter in made.parameters().values():
        torch.nn.init.normal_(parameter, std=0.1)
    return made


def make_batch(lora: Lora, seed: int = 0, count: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    latents, noise = torch.randn((2, count, 4, 8, 8), generator=generator)
    config = lora._denoiser.config
    text = {"hidden": torch.randn((count, tiny.NUM_TOKENS, config.cross_attention_dim), generator=generator)}
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        text["pooled"] = torch.randn((count, width), generator=generator)
        text[IMAGE_SIZES] = torch.full((count, 6), 16.0)
    timesteps = torch.randint(1000, (count,), generator=generator)
    return Batch(latents, noise, timesteps, ("",) * count, text)


def run_pass(lora: Lora, seed: int = 0) -> Tensor:
    losses = lora.losses(make_batch(lora, seed))
    torch.autograd.backward(losses.sum())
    return losses.detach()


def gradients(lora: Lora) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in lora.parameters().values() if parameter.grad is not None]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    """Compare gradients to 1e-6 of their largest value."""
    assert len(found) == len(expected) > 0
    largest = max(float(gradient.abs().max()) for gradient in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * max(1.0, largest))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_passes_have_the_losses_and_gradients_of_peft(family_base: Path, checkpointing: bool) -> None:
    ours = make_lora(family_base, gradientCheckpointing=checkpointing)
    peft = make_lora(family_base, ALMOST_NO_DROPOUT, gradientCheckpointing=checkpointing)
    for seed in range(2):
        torch.testing.assert_close(run_pass(ours, seed), run_pass(peft, seed), rtol=1e-6, atol=1e-6)
    assert_close(gradients(ours), gradients(peft))
    with torch.no_grad():
        batch = make_batch(ours)
        torch.testing.assert_close(ours.losses(batch), peft.losses(batch), rtol=1e-6, atol=1e-6)


def test_attention_is_grouped(family_base: Path) -> None:
    """The comparison with peft covers groups: every attention block of the families has them."""
    processors = list(make_lora(family_base)._denoiser.attn_processors.values())
    assert processors
    assert all(isinstance(processor, AdaptedAttentionProcessor) for processor in processors)


def test_changed_weights_are_used_in_the_next_pass(base: Path) -> None:
    """The optimizer, the weight average and a restored checkpoint change the parameters in place."""
    ours, peft = make_lora(base), make_lora(base, ALMOST_NO_DROPOUT)
    for lora in (ours, peft):
        run_pass(lora)
        with torch.no_grad():
            for parameter in lora.parameters().values():
                assert parameter.grad is not None
                parameter.sub_(0.1 * parameter.grad)
                parameter.grad = None
    torch.testing.assert_close(run_pass(ours), run_pass(peft), rtol=1e-6, atol=1e-6)
    assert_close(gradients(ours), gradients(peft))


def test_a_failed_pass_leaves_no_gradients(base: Path) -> None:
    """Memory that runs out in the middle of a backward pass: the step repeats its passes in smaller parts."""
    lora = make_lora(base)
    run_pass(lora)
    expected = gradients(lora)
    for parameter in lora.parameters().values():
        parameter.grad = None

    def fail(*_: object) -> None:
        raise MemoryError

    def fail_in_backward(_: object, __: object, output: Any) -> None:
        output[0].register_hook(fail)

    attention = next(module for name, module in lora._denoiser.named_modules() if name.endswith("attentions.0"))
    with attention.register_forward_hook(fail_in_backward), pytest.raises(MemoryError):
        run_pass(lora, seed=1)
    for parameter in lora.parameters().values():
        parameter.grad = None
    run_pass(lora)
    assert all(map(torch.equal, gradients(lora), expected))


def test_target_modules_outside_of_attention(base: Path) -> None:
    modules = ["to_q", "to_v", "proj_in", "ff.net.2"]
    settings = {"rank": 3, "alpha": 6, "targetModules": modules}
    ours = make_lora(base, lora=settings)
    peft = make_lora(base, lora={**settings, "dropout": ALMOST_NO_DROPOUT})
    torch.testing.assert_close(run_pass(ours), run_pass(peft), rtol=1e-6, atol=1e-6)
    assert_close(gradients(ours), gradients(peft))
