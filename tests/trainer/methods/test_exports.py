"""diffusers' pipelines load the exports of each method and compute the same output as the trained model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from finetune_contract.outputs.spec import OutputFormat
from finetune_trainer.export.outputs import write_outputs
from finetune_trainer.methods.method import Method
from testing.trainer import tiny
from testing.trainer.methods import export, make_batch, make_method

CAPTION = "word"


def trained(base: Path, name: str, family: str, **training: Any) -> Method:
    """Return a method after a few large steps."""
    method = make_method(base, name, **training)
    caption = f"{CAPTION} <cat>" if name == "TextualInversion" else CAPTION
    optimizer = torch.optim.AdamW(method.parameters().values(), lr=2e-2)
    for seed in range(3):
        torch.autograd.backward(method.losses(make_batch(family, seed, caption=caption)).mean())
        optimizer.step()
        optimizer.zero_grad()
    method.set_training(False)
    return method


def ours(method: Method, family: str, caption: str = CAPTION) -> Tensor:
    """Return the output of the trained method."""
    batch = make_batch(family, 9, 1, caption)
    text = batch.text if method.text is None else {**batch.text, **method.text.get(batch.captions)}
    with torch.no_grad():
        return method.predict(batch.latents, batch.timesteps, text, batch.conditioning)


def theirs(pipeline: Any, family: str, caption: str | None, **control: Any) -> Tensor:
    """Return the output of the pipeline's UNet for the same input; the pipeline encodes the caption, if any."""
    batch = make_batch(family, 9, 1)
    text = dict(batch.text)
    if caption is not None and family == "sdxl":
        text["hidden"], _, text["pooled"], _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False)
    elif caption is not None:
        text["hidden"], _ = pipeline.encode_prompt(caption, torch.device("cpu"), 1, False)
    inputs: dict[str, Any] = {"encoder_hidden_states": text["hidden"]}
    if family == "sdxl":
        inputs["added_cond_kwargs"] = {"text_embeds": text["pooled"], "time_ids": text["sizes"]}
    with torch.no_grad():
        prediction: Tensor = pipeline.unet(batch.latents, batch.timesteps, **inputs, **control).sample
    return prediction


def open_pipeline(folder: Path) -> Any:
    return DiffusionPipeline.from_pretrained(folder, safety_checker=None)


def write(method: Method, folder: Path) -> Path:
    write_outputs(method, (), folder)
    return folder / "outputs"


@pytest.mark.parametrize("name", ["Full", "DreamBooth, text"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_exported_pipeline_computes_the_same_as_the_trained_model(
    bases: dict[str, Path], family: str, name: str, tmp_path: Path
) -> None:
    method = trained(bases[family], name, family)
    pipeline = open_pipeline(write(method, tmp_path))
    caption = CAPTION if method.text is not None else None
    torch.testing.assert_close(ours(method, family), theirs(pipeline, family, caption), rtol=1e-4, atol=1e-5)
    assert str(tmp_path) not in "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    assert (ours(method, family) - theirs(open_pipeline(bases[family]), family, caption)).abs().max() > 1e-2


@pytest.mark.parametrize("output", [OutputFormat.DIFFUSERS, OutputFormat.KOHYA])
@pytest.mark.parametrize("name", ["LoRA", "LoRA, text"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_exported_lora_computes_the_same_as_the_trained_model(
    bases: dict[str, Path], family: str, name: str, output: OutputFormat, tmp_path: Path
) -> None:
    if "text" in name and output is OutputFormat.KOHYA:
        lora = {"rank": 2, "alpha": 3, "trainTextEncoder": True}
        method = trained(bases[family], name, family, lora=lora)
    else:
        method = trained(bases[family], name, family)
    (file,) = export(method, output, tmp_path)
    pipeline = open_pipeline(bases[family])
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    caption = CAPTION if method.text is not None else None
    torch.testing.assert_close(ours(method, family), theirs(pipeline, family, caption), rtol=1e-4, atol=1e-5)
    assert (ours(method, family) - theirs(open_pipeline(bases[family]), family, caption)).abs().max() > 1e-3


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_exported_embeddings_compute_the_same_as_the_trained_model(
    bases: dict[str, Path], family: str, tmp_path: Path
) -> None:
    method = trained(bases[family], "TextualInversion", family)
    folder = write(method, tmp_path)
    pipeline = open_pipeline(bases[family])
    parts = {"text_encoder": "tokenizer"} | ({"text_encoder_2": "tokenizer_2"} if family == "sdxl" else {})
    for number, (encoder, tokenizer) in enumerate(parts.items()):
        file = folder / ("learned_embeds.safetensors" if number == 0 else "learned_embeds_2.safetensors")
        pipeline.load_textual_inversion(
            file, text_encoder=getattr(pipeline, encoder), tokenizer=getattr(pipeline, tokenizer)
        )
    caption = f"{CAPTION} <cat>"
    torch.testing.assert_close(ours(method, family, caption), theirs(pipeline, family, caption), rtol=1e-4, atol=1e-5)
    (webui,) = export(method, OutputFormat.WEBUI, tmp_path)
    keys = {"clip_l", "clip_g"} if family == "sdxl" else {"emb_params"}
    assert load_file(webui).keys() == keys


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_exported_controlnet_computes_the_same_and_can_be_trained_further(
    bases: dict[str, Path], family: str, tmp_path: Path
) -> None:
    method = trained(bases[family], "ControlNet", family)
    controlnet = ControlNetModel.from_pretrained(write(method, tmp_path))
    pipeline, batch = open_pipeline(bases[family]), make_batch(family, 9, 1)
    inputs: dict[str, Any] = {"encoder_hidden_states": batch.text["hidden"]}
    if family == "sdxl":
        inputs["added_cond_kwargs"] = {"text_embeds": batch.text["pooled"], "time_ids": batch.text["sizes"]}
    with torch.no_grad():
        down, middle = controlnet(
            batch.latents, batch.timesteps, controlnet_cond=batch.conditioning, return_dict=False, **inputs
        )
    control = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    torch.testing.assert_close(ours(method, family), theirs(pipeline, family, None, **control), rtol=1e-4, atol=1e-5)
    again = make_method(bases[family], "ControlNet", controlnet={"base": str(tmp_path / "outputs")})
    again.set_training(False)
    torch.testing.assert_close(ours(again, family), ours(method, family))


@pytest.mark.parametrize(("mask", "expected"), [(0o002, 0o664), (0o077, 0o600)])
@pytest.mark.parametrize("name", ["ControlNet", "Full", "LoRA"])
def test_outputs_have_the_permissions_of_other_files(
    name: str, mask: int, expected: int, base: Path, tmp_path: Path
) -> None:
    """Web UIs and other jobs run as other users of the same group."""
    method = make_method(base, name)
    before = os.umask(mask)
    try:
        write_outputs(method, (), tmp_path / "job")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "job").rglob("*") if path.is_file()}
    assert modes == {expected}
