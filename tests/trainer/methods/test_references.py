"""Losses and gradients compared with plain references: the papers' formulas in fp32 on diffusers' models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from finetune_contract.input_spec import ModelSpec
from finetune_trainer.data.batches import Batch
from finetune_trainer.data.images.decoding import CropView, micro_conditioning
from finetune_trainer.methods.method import Method
from finetune_trainer.models.base import open_base
from testing.trainer import tiny
from testing.trainer.methods import CPU, make_batch, make_method

EXACT: Any = {"rtol": 1e-5, "atol": 1e-5}


def alphas(base: Path) -> Any:
    config = json.loads((base / "scheduler" / "scheduler_config.json").read_text())
    betas = np.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, 1000, dtype=np.float64) ** 2
    return np.cumprod(1 - betas)


def plain_loss(base: Path, batch: Batch, predict: Any, is_v: bool, gamma: float | None = None) -> Tensor:
    """Return the mean loss over the samples, from the formulas; `predict` is the model."""
    a = torch.tensor(alphas(base)[batch.timesteps.numpy()]).view(-1, 1, 1, 1)
    mixed = batch.noise if batch.mixed is None else batch.mixed
    noisy = (a.sqrt() * batch.latents + (1 - a).sqrt() * mixed).float()
    target = (a.sqrt() * batch.noise - (1 - a).sqrt() * batch.latents).float() if is_v else batch.noise
    errors = ((predict(noisy) - target) ** 2).mean(dim=(1, 2, 3))
    if gamma is not None:
        snr = (a / (1 - a)).view(-1)
        errors = errors * (snr.clamp(max=gamma) / (snr + 1 if is_v else snr)).float()
    weights = torch.ones(len(errors)) if batch.weights is None else batch.weights
    loss: Tensor = (errors * weights).sum() / len(errors)
    return loss


def conditions(batch: Batch, family: str) -> dict[str, Any]:
    inputs: dict[str, Any] = {"encoder_hidden_states": batch.text["hidden"]}
    if family == "sdxl":
        inputs["added_cond_kwargs"] = {"text_embeds": batch.text["pooled"], "time_ids": batch.text["sizes"]}
    return inputs


def backward(loss: Tensor) -> None:
    torch.autograd.backward(loss)


def assert_gradients(method: Method, module: nn.Module, prefix: str = "") -> None:
    reference = dict(module.named_parameters())
    assert method.parameters().keys() == {f"{prefix}{name}" for name in reference}
    for name, parameter in reference.items():
        assert parameter.grad is not None, name
        torch.testing.assert_close(method.parameters()[f"{prefix}{name}"].grad, parameter.grad, **EXACT)


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_full_has_the_loss_and_gradients_of_the_reference(
    bases: dict[str, Path], family: str, gamma: float | None
) -> None:
    base, batch = bases[family], make_batch(family)
    batch = dataclasses.replace(batch, mixed=batch.noise + 0.1 * torch.randn_like(batch.noise))
    method = make_method(base, "Full", snrGamma=gamma)
    loss = method.losses(batch).mean()
    backward(loss)
    unet = UNet2DConditionModel.from_pretrained(base / "unet").train()
    reference = plain_loss(
        base,
        batch,
        lambda noisy: unet(noisy, batch.timesteps, **conditions(batch, family)).sample,
        family == "sd2",
        gamma,
    )
    backward(reference)
    torch.testing.assert_close(loss, reference, **EXACT)
    assert_gradients(method, unet, "unet.")


def test_prior_preservation_has_the_loss_and_gradients_of_the_reference(base: Path) -> None:
    """L = E|instances| + w E|class images| (https://arxiv.org/abs/2208.12242, eq. 2)."""
    weight = 0.3
    everything = make_batch("sd1", count=4)
    batch = dataclasses.replace(everything, weights=torch.tensor([1, 1, weight, weight]))
    method = make_method(base, "DreamBooth")
    # The loop divides by the number of instance images, without the class images.
    loss = method.losses(batch).sum() / 2
    backward(loss)
    unet = UNet2DConditionModel.from_pretrained(base / "unet").train()

    def part(rows: slice) -> Tensor:
        text = {"hidden": everything.text["hidden"][rows]}
        one = Batch(everything.latents[rows], everything.noise[rows], everything.timesteps[rows], (), text)
        return plain_loss(base, one, lambda noisy: unet(noisy, one.timesteps, one.text["hidden"]).sample, False)

    reference = part(slice(0, 2)) + weight * part(slice(2, 4))
    backward(reference)
    torch.testing.assert_close(loss, reference, **EXACT)
    assert_gradients(method, unet, "unet.")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_controlnet_has_the_loss_and_gradients_of_the_reference(bases: dict[str, Path], family: str) -> None:
    base, batch = bases[family], make_batch(family)
    method = make_method(base, "ControlNet")
    torch.manual_seed(1)
    for parameter in method.parameters().values():
        # Initially the last layers are zero, so other layers would get no gradient.
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    loss = method.losses(batch).mean()
    backward(loss)
    unet = UNet2DConditionModel.from_pretrained(base / "unet").requires_grad_(False)
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32)).train()
    controlnet.load_state_dict(dict(method.parameters()))
    inputs = conditions(batch, family)

    def predict(noisy: Tensor) -> Any:
        control = controlnet(noisy, batch.timesteps, controlnet_cond=batch.conditioning, **inputs)
        return unet(
            noisy,
            batch.timesteps,
            down_block_additional_residuals=control.down_block_res_samples,
            mid_block_additional_residual=control.mid_block_res_sample,
            **inputs,
        ).sample

    reference = plain_loss(base, batch, predict, family == "sd2")
    backward(reference)
    torch.testing.assert_close(loss, reference, **EXACT)
    assert_gradients(method, controlnet)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_textual_inversion_has_the_loss_and_gradients_of_the_reference(bases: dict[str, Path], family: str) -> None:
    """The reference enlarges the table by two rows, computes all gradients, and keeps those of the new rows."""
    base, batch = bases[family], make_batch(family, caption="a <cat>")
    method = make_method(base, "TextualInversion")
    loss = method.losses(batch).mean()
    backward(loss)
    unet = UNet2DConditionModel.from_pretrained(base / "unet").requires_grad_(False)
    kinds = {"text_encoder": CLIPTextModel} | (
        {"text_encoder_2": CLIPTextModelWithProjection} if family == "sdxl" else {}
    )
    tables, outputs = {}, []
    for name, kind in kinds.items():
        tokenizer = CLIPTokenizer.from_pretrained(base / name.replace("text_encoder", "tokenizer"))
        tokenizer.add_tokens(["<cat>", "<cat>_1"])
        model = kind.from_pretrained(base / name)
        size = model.get_input_embeddings().num_embeddings
        model.resize_token_embeddings(size + 2)
        tables[name] = model.get_input_embeddings().weight
        tables[name].data[size:] = tables[name].data[tokenizer.convert_tokens_to_ids("a</w>")]
        ids = tokenizer(
            ["a <cat> <cat>_1"] * 3,
            padding="max_length",
            truncation=True,
            max_length=tiny.NUM_TOKENS,
            return_tensors="pt",
        ).input_ids
        outputs.append(model(ids, output_hidden_states=True))
    text = dict(batch.text)
    if family == "sdxl":
        text["hidden"] = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        text["pooled"] = outputs[1].text_embeds
    else:
        text["hidden"] = outputs[0].last_hidden_state
    inputs = conditions(dataclasses.replace(batch, text=text), family)
    is_v = family == "sd2"
    reference = plain_loss(base, batch, lambda noisy: unet(noisy, batch.timesteps, **inputs).sample, is_v)
    backward(reference)
    torch.testing.assert_close(loss, reference, **EXACT)
    assert set(method.parameters()) == set(kinds)
    for name, table in tables.items():
        gradient = method.parameters()[name].grad
        assert table.grad is not None
        assert gradient is not None
        assert gradient.any()
        torch.testing.assert_close(gradient, table.grad[-2:], **EXACT)


def test_cached_and_live_text_conditions_have_the_same_loss(bases: dict[str, Path]) -> None:
    for family, base in bases.items():
        batch = make_batch(family)
        encoder = open_base(ModelSpec(base=str(base))).load_text_encoder(CPU)
        with torch.no_grad():
            cached = dataclasses.replace(batch, text={**batch.text, **encoder.encode(batch.captions)})
        frozen, live = make_method(base, "DreamBooth"), make_method(base, "DreamBooth, text")
        torch.testing.assert_close(frozen.losses(cached), live.losses(batch), **EXACT)


def test_sdxl_conditions_equal_those_of_its_pipeline(bases: dict[str, Path]) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(bases["sdxl"])
    encoder = open_base(ModelSpec(base=str(bases["sdxl"]))).load_text_encoder(CPU)
    with torch.no_grad():
        ours = encoder.encode(["", "a dog"])
        prompt, empty, pooled, empty_pooled = pipeline.encode_prompt("a dog", device=CPU)
    torch.testing.assert_close(ours["hidden"], torch.cat([empty, prompt]))
    torch.testing.assert_close(ours["pooled"], torch.cat([empty_pooled, pooled]))
    sizes = pipeline._get_add_time_ids((300, 400), (2, 3), (16, 16), torch.float32, tiny.WIDTH)
    view = CropView(left=3 / 5, top=1.0)
    assert micro_conditioning((400, 300), (16, 16), view).tolist() == [300, 400, 0, 3, 16, 16]
    assert sizes.tolist() == [[300, 400, 2, 3, 16, 16]]


def test_crop_offset_of_a_mirrored_image_counts_from_the_right() -> None:
    plain = micro_conditioning((64, 32), (16, 16), CropView(left=0.25, top=0.5))
    mirrored = micro_conditioning((64, 32), (16, 16), CropView(left=0.25, top=0.5, flip=True))
    assert plain.tolist() == [32, 64, 0, 4, 16, 16]
    assert mirrored.tolist() == [32, 64, 0, 12, 16, 16]
