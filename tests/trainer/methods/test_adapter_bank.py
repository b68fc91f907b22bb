"""Adapters in flat storage: the losses and gradients of peft, in every kind of pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor

from finetune_contract.input_spec import ModelSpec
from finetune_contract.spec import TrainingSpec
from finetune_trainer.data.batches import Batch
from finetune_trainer.data.sampling.draws import Draws
from finetune_trainer.distributed import buckets
from finetune_trainer.distributed.buckets import GradientBuckets
from finetune_trainer.distributed.local import LocalGradients
from finetune_trainer.distributed.world import World
from finetune_trainer.fused import mask_draws
from finetune_trainer.methods import adapter_bank, adapter_group
from finetune_trainer.methods import lora as lora_module
from finetune_trainer.methods.adapted_attention import AdaptedAttention
from finetune_trainer.methods.adapter_bank import AdapterBank
from finetune_trainer.methods.adapter_group import AdapterGroup
from finetune_trainer.methods.lora import Lora
from finetune_trainer.methods.method import MethodContext
from finetune_trainer.models.base import open_base
from finetune_trainer.models.family import IMAGE_SIZES
from finetune_trainer.optim.flat import storage_order
from testing.trainer import tiny

CPU = torch.device("cpu")
WORLD = World(0, 1, 0, CPU)
DORA = {"lora": {"rank": 3, "alpha": 6, "useDora": True}}


@pytest.fixture(name="family_base", scope="module", params=tiny.FAMILIES)
def _family_base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_base(tmp_path_factory.mktemp("base") / "base", family=request.param)


def make_lora(base: Path, dtype: torch.dtype = torch.float32, **training: Any) -> Lora:
    settings = {"lora": {"rank": 3, "alpha": 6}} | training
    spec = TrainingSpec.model_validate({"method": "LoRA", **settings})
    made = Lora(MethodContext(open_base(ModelSpec(base=str(base))), spec, Draws(0), CPU, dtype))
    torch.manual_seed(0)
    for name, parameter in made.parameters().items():
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.1 * torch.randn(parameter.shape))
        else:
            torch.nn.init.normal_(parameter, std=0.1)
    return made


def make_peft(base: Path, dtype: torch.dtype = torch.float32, **training: Any) -> Lora:
    """Return the method with the forward passes of peft and diffusers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora_module, "use_adapter_bank", lambda *_: None)
        return make_lora(base, dtype, **training)


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


@pytest.mark.parametrize(
    "training",
    [{}, {"gradientCheckpointing": True}, DORA, {**DORA, "gradientCheckpointing": True}],
    ids=["plain", "checkpointing", "DoRA", "DoRA, checkpointing"],
)
def test_two_passes_have_the_losses_and_gradients_of_peft(family_base: Path, training: dict[str, Any]) -> None:
    ours, peft = make_lora(family_base, **training), make_peft(family_base, **training)
    for seed in range(2):
        torch.testing.assert_close(run_pass(ours, seed), run_pass(peft, seed), rtol=1e-6, atol=1e-6)
    assert_close(gradients(ours), gradients(peft))
    with torch.no_grad():
        batch = make_batch(ours)
        torch.testing.assert_close(ours.losses(batch), peft.losses(batch), rtol=1e-6, atol=1e-6)


class FixedDropout(torch.nn.Module):
    """Dropout whose mask depends only on the shape of the input and the layer's place in its group."""

    def __init__(self, place: int, keep: float) -> None:
        super().__init__()
        self._place, self._keep = place, keep

    def forward(self, x: Tensor) -> Tensor:
        return x * fixed_mask(self._place, x.flatten(0, -2).shape, self._keep).view(x.shape) / self._keep


def fixed_mask(place: int, shape: Sequence[int], keep: float) -> Tensor:
    return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(place)) < keep


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_has_the_losses_and_gradients_of_peft(
    base: Path, monkeypatch: pytest.MonkeyPatch, use_dora: bool, checkpointing: bool
) -> None:
    """With the same masks: each adapter drops its own elements of an input that it has in common with others."""
    made: list[AdapterGroup] = []
    make_groups = AdapterBank._make_groups

    def record(*args: Any) -> list[AdapterGroup]:
        made.extend(make_groups(*args))
        return made

    def draw(shape: Sequence[int], keep: float, _: torch.device) -> Tensor:
        return torch.stack([fixed_mask(place, shape[1:], keep) for place in range(shape[0])])

    monkeypatch.setattr(AdapterBank, "_make_groups", record)
    monkeypatch.setattr(adapter_group, "draw_mask", draw)
    settings = {"rank": 3, "alpha": 6, "dropout": 0.3, "useDora": use_dora}
    training: dict[str, Any] = {"lora": settings, "gradientCheckpointing": checkpointing}
    ours, peft = make_lora(base, **training), make_peft(base, **training)
    places = {id(layer): place for group in made for place, layer in enumerate(group.layers)}
    assert max(places.values()) > 2, "keys and values of several blocks are one group"
    for own, layer in zip(ours._denoiser.modules(), peft._denoiser.modules(), strict=True):
        if id(own) in places:
            layer.lora_dropout["default"] = FixedDropout(places[id(own)], 0.7)
    torch.testing.assert_close(run_pass(ours), run_pass(peft), rtol=1e-6, atol=1e-6)
    assert_close(gradients(ours), gradients(peft))


def test_adapters_drop_independent_elements_in_training_only(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[Tensor] = []
    draw = mask_draws.draw_mask

    def record(*args: Any) -> Tensor:
        masks.append(draw(*args))
        return masks[-1]

    monkeypatch.setattr(adapter_group, "draw_mask", record)
    lora = make_lora(base, lora={"rank": 3, "dropout": 0.25})
    run_pass(lora)
    drawn = [mask for group in masks for mask in group]
    assert len(drawn) == len(lora.parameters()) // 2, "one mask for each adapter"
    kept = torch.cat([mask.flatten().float() for mask in drawn]).mean()
    assert float(kept) == pytest.approx(0.75, abs=0.01)
    by_shape = {(mask.shape, tuple(mask.flatten().tolist())) for mask in drawn}
    assert len(by_shape) == len(drawn), "no two masks are equal"
    masks.clear()
    lora.set_training(False)
    run_pass(lora)
    assert not masks


def test_text_that_a_denoiser_changes_on_its_way_is_used(base: Path) -> None:
    """Keys and values that were computed from other text are not used."""
    ours, peft = make_lora(base), make_peft(base)
    for lora in (ours, peft):
        for module in lora._denoiser.modules():
            if isinstance(module, BasicTransformerBlock):
                module.register_forward_pre_hook(_double_text, with_kwargs=True)
    torch.testing.assert_close(run_pass(ours), run_pass(peft), rtol=1e-6, atol=1e-6)
    assert_close(gradients(ours), gradients(peft))


def _double_text(_: torch.nn.Module, args: tuple[Any, ...], arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**arguments, "encoder_hidden_states": 2 * arguments["encoder_hidden_states"]}


def test_keys_and_values_are_released_after_a_pass(base: Path) -> None:
    lora = make_lora(base)
    with torch.no_grad():
        lora.losses(make_batch(lora))
    assert not _held_outputs(lora)
    losses = lora.losses(make_batch(lora))
    assert _held_outputs(lora)
    torch.autograd.backward(losses.sum())
    assert not _held_outputs(lora)


def _held_outputs(lora: Lora) -> list[Any]:
    hooks = [hook.__closure__ for hook in lora._denoiser._forward_pre_hooks.values()]
    (bank,) = [cell.cell_contents for cells in hooks for cell in cells if isinstance(cell.cell_contents, AdapterBank)]
    return list(bank.text._outputs)


def test_attention_is_grouped(family_base: Path) -> None:
    """The comparison with peft covers groups: every attention block of the families has them."""
    processors = list(make_lora(family_base)._denoiser.attn_processors.values())
    assert processors
    assert all(isinstance(processor, AdaptedAttention) for processor in processors)


def test_changed_weights_are_used_in_the_next_pass(base: Path) -> None:
    """The optimizer, the weight average and a restored checkpoint change the parameters in place."""
    ours, peft = make_lora(base), make_peft(base)
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


@pytest.mark.parametrize("training", [{}, DORA], ids=["plain", "DoRA"])
def test_gradients_that_are_held_in_one_buffer_are_added_at_once(base: Path, training: dict[str, Any]) -> None:
    """Two passes of a step, as with CUDA graphs: the same sums without one addition for each parameter."""
    lora, held = make_lora(base, **training), make_lora(base, **training)
    parameters = list(held.parameters().values())
    buffer = LocalGradients([parameters[index] for index in storage_order(parameters)], CPU)
    buffer.hold()
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(AdapterBank, "_take_gradients")
        for seed in range(2):
            run_pass(held, seed)
    for seed in range(2):
        run_pass(lora, seed)
    assert all(map(torch.equal, gradients(held), gradients(lora)))


@pytest.mark.parametrize("training", [{}, DORA], ids=["plain", "DoRA"])
@pytest.mark.parametrize("numel", [2**24, 1500], ids=["one bucket", "several buckets"])
def test_gradients_for_other_ranks_are_added_to_their_buckets_at_once(
    base: Path, monkeypatch: pytest.MonkeyPatch, training: dict[str, Any], numel: int
) -> None:
    """The sums start in the last pass, and have the bits of gradients that are moved one by one."""
    monkeypatch.setattr(buckets, "BUCKET_NUMEL", numel)
    lora, held = make_lora(base, **training), make_lora(base, **training)
    results = []
    for method in (lora, held):
        parameters = list(method.parameters().values())
        # A world of one rank sums its own values only; the order of the sums is that of several ranks.
        gradients_of_ranks = GradientBuckets([parameters[index] for index in storage_order(parameters)], WORLD)
        gradients_of_ranks.hold()
        with pytest.MonkeyPatch.context() as patch:
            if method is held:
                patch.delattr(AdapterBank, "_take_gradients")
            else:
                patch.setattr(adapter_bank, "_held_gradients", lambda _: None)
            for step in range(2):
                gradients_of_ranks.clear()
                run_pass(method, 2 * step)
                assert all(bucket.pending is None for bucket in gradients_of_ranks._buckets)
                gradients_of_ranks.expect_last_pass()
                run_pass(method, 2 * step + 1)
                assert not gradients_of_ranks._waiting, "all sums have started"
                gradients_of_ranks.reduce(WORLD)
        assert (len(gradients_of_ranks._buckets) > 1) == (numel == 1500)
        results.append(gradients(method))
    assert all(map(torch.equal, *results))


def test_hooks_of_held_gradients_are_called(base: Path) -> None:
    """With several ranks a hook starts the sum of a full bucket."""
    lora = make_lora(base)
    parameters = list(lora.parameters().values())
    LocalGradients([parameters[index] for index in storage_order(parameters)], CPU).hold()
    called: list[Tensor] = []
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(called.append)  # type: ignore[no-untyped-call]
    run_pass(lora)
    assert len(called) == len(parameters)


def test_target_modules_outside_of_attention(base: Path) -> None:
    modules = ["to_q", "to_v", "proj_in", "ff.net.2"]
    settings = {"rank": 3, "alpha": 6, "targetModules": modules}
    ours = make_lora(base, lora=settings)
    peft = make_peft(base, lora=settings)
    torch.testing.assert_close(run_pass(ours), run_pass(peft), rtol=1e-6, atol=1e-6)
    assert_close(gradients(ours), gradients(peft))
