"""LoRA: losses and gradients compared with a plain reference, and files that diffusers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from safetensors import safe_open

from finetune_contract.input_spec import ModelSpec
from finetune_contract.methods import METHODS
from finetune_contract.outputs.spec import OutputFormat, OutputSpec
from finetune_contract.spec import Method, TrainingSpec
from finetune_trainer.data.batches import Batch
from finetune_trainer.data.sampling.draws import Draws, Purpose
from finetune_trainer.data.sampling.order import SampleRef
from finetune_trainer.distributed.buckets import GradientBuckets
from finetune_trainer.distributed.gradients import clip_factor
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import ConfigError
from finetune_trainer.export.outputs import check_outputs, write_outputs
from finetune_trainer.methods.lora import Lora
from finetune_trainer.methods.method import MethodContext
from finetune_trainer.models.base import open_base
from testing.trainer import tiny
from testing.trainer.methods import export

CPU = torch.device("cpu")


def make_lora(base: Path, dtype: torch.dtype = torch.float32, **training: Any) -> Lora:
    settings = {"method": "LoRA", "lora": {"rank": 2, "alpha": 6}, **training}
    spec = TrainingSpec.model_validate(settings)
    return Lora(MethodContext(open_base(ModelSpec(base=str(base))), spec, Draws(0), CPU, dtype))


def make_batch(seed: int = 0, count: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    latents, noise = torch.randn((2, count, 4, 8, 8), generator=generator)
    hidden = torch.randn((count, tiny.NUM_TOKENS, tiny.WIDTH), generator=generator)
    timesteps = torch.randint(1000, (count,), generator=generator)
    return Batch(latents, noise, timesteps, ("",) * count, {"hidden": hidden})


def train_a_little(lora: Lora) -> None:
    optimizer = torch.optim.AdamW(lora.parameters().values(), lr=1e-2)
    for seed in range(4):
        torch.autograd.backward(lora.losses(make_batch(seed)).mean())
        optimizer.step()
        optimizer.zero_grad()


def test_loss_and_gradients_equal_those_of_a_plain_loop(base: Path) -> None:
    """The plain loop is the one of diffusers' script in fp32: one batch, mean loss, gradients by autograd."""
    lora, batch = make_lora(base), make_batch(count=4)
    parameters = list(lora.parameters().values())
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.1)
    buckets = GradientBuckets(parameters, World(0, 1, 0, CPU))
    losses = [lora.losses(part) for part in split(batch, (3, 1))]
    for part in losses:
        torch.autograd.backward(part.sum() / 4)
    buckets.reduce(World(0, 1, 0, CPU))

    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    trained = {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}
    assert list(trained) == list(lora.parameters())
    for name, parameter in trained.items():
        parameter.data.copy_(lora.parameters()[name])
    noisy = DDPMScheduler.from_pretrained(base, subfolder="scheduler").add_noise(
        batch.latents, batch.noise, batch.timesteps
    )
    prediction = unet(noisy, batch.timesteps, encoder_hidden_states=batch.text["hidden"]).sample
    loss = torch.nn.functional.mse_loss(prediction, batch.noise)
    torch.autograd.backward(loss)

    torch.testing.assert_close(torch.cat(losses).mean(), loss, rtol=1e-5, atol=1e-6)
    for name, parameter in lora.parameters().items():
        torch.testing.assert_close(parameter.grad, trained[name].grad, rtol=1e-5, atol=1e-5)
    reference = torch.nn.utils.clip_grad_norm_(trained.values(), 0.5)
    torch.testing.assert_close(buckets.norm(), reference, rtol=1e-5, atol=0)
    buckets.scale(clip_factor(float(reference), 0.5))
    for name, parameter in lora.parameters().items():
        torch.testing.assert_close(parameter.grad, trained[name].grad, rtol=1e-5, atol=1e-5)


def split(batch: Batch, sizes: tuple[int, ...]) -> list[Batch]:
    """Return a batch split into micro-batches."""
    parts, start = [], 0
    for size in sizes:
        rows = slice(start, start + size)
        text = {name: value[rows] for name, value in batch.text.items()}
        parts.append(Batch(batch.latents[rows], batch.noise[rows], batch.timesteps[rows], batch.captions[rows], text))
        start += size
    return parts


def test_initial_adapter_is_reproducible_and_has_no_effect(base: Path) -> None:
    first, second = make_lora(base), make_lora(base)
    assert any("lora_B" in name for name in first.parameters())
    for name, parameter in first.parameters().items():
        assert torch.equal(parameter, second.parameters()[name])
        assert parameter.dtype is torch.float32
        assert "lora_B" not in name or not parameter.any()


def test_bf16_trains_fp32_weights_with_similar_losses(base: Path) -> None:
    exact, rough = make_lora(base), make_lora(base, torch.bfloat16)
    assert all(parameter.dtype is torch.float32 for parameter in rough.parameters().values())
    torch.testing.assert_close(exact.losses(make_batch()), rough.losses(make_batch()), rtol=0.05, atol=0.02)


def test_gradient_checkpointing_keeps_gradients(base: Path) -> None:
    plain, saving = make_lora(base), make_lora(base, gradientCheckpointing=True)
    for lora in (plain, saving):
        torch.autograd.backward(lora.losses(make_batch()).sum())
    for name, parameter in plain.parameters().items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, saving.parameters()[name].grad)


def test_dropout_is_active_only_in_training(base: Path) -> None:
    lora = make_lora(base, lora={"rank": 2, "dropout": 0.5})
    train_a_little(lora)
    batch = make_batch()
    assert not torch.equal(lora.losses(batch), lora.losses(batch))
    lora.set_training(False)
    assert torch.equal(lora.losses(batch), lora.losses(batch))


def test_unknown_target_modules_are_refused(base: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"training\.lora\.targetModules: to_w match no layer .* write one or more of .*to_k, .*to_q"
    ):
        make_lora(base, lora={"targetModules": ["to_w"]})


def test_diffusers_loads_the_exported_lora(base: Path, tmp_path: Path) -> None:
    """The pipeline with the file computes the same as the trained UNet; alpha differs from the rank."""
    lora, batch = make_lora(base), make_batch()
    train_a_little(lora)
    (written,) = write_outputs(lora, (), tmp_path)
    file = tmp_path / "outputs" / "pytorch_lora_weights.safetensors"
    assert written.size_bytes == file.stat().st_size
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipeline.load_lora_weights(file.parent)
    lora.set_training(False)
    noisy = Draws(0).normal(Purpose.NOISE, SampleRef(0, 0), (3, 4, 8, 8))
    with torch.no_grad():
        ours = lora.predict(noisy, batch.timesteps, batch.text)
        theirs = pipeline.unet(noisy, batch.timesteps, encoder_hidden_states=batch.text["hidden"]).sample
        base_prediction = UNet2DConditionModel.from_pretrained(base / "unet")(
            noisy, batch.timesteps, encoder_hidden_states=batch.text["hidden"]
        ).sample
    torch.testing.assert_close(ours, theirs)
    assert (ours - base_prediction).abs().max() > 1e-3


def test_file_has_the_content_that_diffusers_writes(base: Path, tmp_path: Path) -> None:
    lora = make_lora(base, lora={"rank": 2})
    write_outputs(lora, (), tmp_path / "ours")
    from peft.utils import get_peft_model_state_dict  # noqa: PLC0415

    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "theirs", unet_lora_layers=get_peft_model_state_dict(lora._denoiser)
    )
    contents = []
    for folder in (tmp_path / "ours" / "outputs", tmp_path / "theirs"):
        with safe_open(folder / "pytorch_lora_weights.safetensors", framework="pt") as file:
            tensors = {name: file.get_tensor(name).tolist() for name in sorted(file.keys())}
            contents.append((file.metadata(), tensors))
    assert contents[0] == contents[1]


def test_file_for_diffusers_has_the_strength_in_its_weights(base: Path, tmp_path: Path) -> None:
    """A reader without metadata takes the rank as alpha: alpha / rank = 3 is in B, once."""
    lora = make_lora(base)
    train_a_little(lora)
    export(lora, OutputFormat.DIFFUSERS, tmp_path)
    trained = {f"unet.{name}".replace(".default", ""): value for name, value in lora.parameters().items()}
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(trained)
        for name, value in trained.items():
            torch.testing.assert_close(file.get_tensor(name), value.detach() * (3 if "lora_B" in name else 1))
        assert file.metadata() == {"format": "pt"}, "old releases do not read an alpha in metadata"


def test_writing_outputs_twice_gives_the_same_bytes(base: Path, tmp_path: Path) -> None:
    lora = make_lora(base)
    outputs = (OutputSpec(format=OutputFormat.DIFFUSERS, to=str(tmp_path / "target")),)
    first = write_outputs(lora, outputs, tmp_path)
    assert first == write_outputs(lora, outputs, tmp_path)
    names = sorted(entry.name for entry in (tmp_path / "target").iterdir())
    assert names == [".default.job.outputs.json", "pytorch_lora_weights.safetensors"]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            {"format": "single-file", "to": "x"},
            r"outputs\[0\]\.format: the method cannot write single-file; write comfyui, compiled, diffusers",
        ),
    ],
)
def test_unsupported_outputs_are_refused_before_the_run(output: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_outputs([OutputSpec.model_validate(output)], METHODS[Method.LORA].formats)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fast_linears_have_the_losses_and_gradients_of_peft(base: Path, dtype: torch.dtype) -> None:
    """A dropout of almost zero keeps peft's own layers in the reference."""
    fast, reference = make_lora(base, dtype), make_lora(base, dtype, lora={"rank": 2, "alpha": 6, "dropout": 1e-9})
    tolerance: Any = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 0.1, "atol": 0.01}
    for lora in (fast, reference):
        torch.manual_seed(0)
        for parameter in lora.parameters().values():
            torch.nn.init.normal_(parameter, std=0.1)
        torch.autograd.backward(lora.losses(make_batch()).sum())
    for name, parameter in fast.parameters().items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, reference.parameters()[name].grad, **tolerance)
