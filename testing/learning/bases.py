"""Small circle bases of the other families, derived from `examples/base-circles` (an SD 1.x), for `bench.learning`.

`sd2` predicts v. `sdxl` has two text encoders, and is conditioned on the size and the crop of the picture. Both start
from the weights of the SD 1.x base where these fit, and are trained for a few minutes on plain circles. Their training
loop is separate from the trainer and uses diffusers' schedulers and its order of SDXL's sizes, so an error in the
trainer's code becomes visible. They are kept in the user's cache under a hash of everything that determines them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from finetune_trainer.demo import base_unet, base_vae, circles
from finetune_trainer.demo.architecture import IMAGE_SIZE
from finetune_trainer.demo.picture_metrics import measure_picture, sample_images

BASE = Path(__file__).parents[2] / "examples" / "base-circles"
FAMILIES = ("sd1", "sd2", "sdxl")
NUM_STEPS = {"sd2": 200, "sdxl": 500}
"""Training steps of a base; the sd1 base is part of the repository."""
_MAX_SAMPLES = 2048
_BATCH_SIZE = 32
_LEARNING_RATE = 1e-3
_CAPTION_DROPOUT = 0.1
_MAX_SIZE = 96
"""Side of the largest picture that SDXL's crops come from."""
_SIZE_CHANNELS = 16
"""Width of the embedding of each of SDXL's six sizes."""
_SHOWN_EVERY = 50
_DRAWN = 4
"""One caption in this many is drawn with a new base, as a check."""

PrintLine = Callable[[str], None]


@dataclass(frozen=True)
class CirclePictures:
    """Captioned pictures of circles.

    Attributes:
        latents: scaled latents, float32 (n, 4, 8, 8).
        token_ids: int64 (n, tokens).
        sizes: SDXL's image sizes: height and width of the picture, top and left of the crop, height and width of the
            crop; float32 (n, 6).
    """

    latents: Tensor
    token_ids: Tensor
    sizes: Tensor


def ensure_base(family: str, print_line: PrintLine, num_steps: int | None = None) -> Path:
    """Return the folder of a family's base; train the base if it is not in the cache.

    Args:
        family: one of `FAMILIES`.
        print_line: receives progress messages.
        num_steps: training steps; the default is enough for a base that draws well.
    """
    if family == "sd1":
        return BASE
    steps = NUM_STEPS[family] if num_steps is None else num_steps
    folder = cache_folder() / f"{family}-{_key(steps)}"
    if folder.is_dir():
        print_line(f"{family} base: {folder}")
        return folder
    started = time.monotonic()
    folder.parent.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        # The number of threads affects the last bits: use the same number on all machines.
        torch.set_num_threads(1)
        try:
            _build(family, steps, Path(temporary) / family, print_line)
        finally:
            torch.set_num_threads(threads)
        try:
            (Path(temporary) / family).rename(folder)
        except OSError:
            # Another process was faster; its base is identical.
            if not folder.is_dir():
                raise
    print_line(f"{family} base: trained in {time.monotonic() - started:.0f} s, stored in {folder}")
    return folder


def cache_folder() -> Path:
    """Return the folder of the bases: below `$XDG_CACHE_HOME`, else below `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "finetune-operator" / "learning-bases"


def _key(num_steps: int) -> str:
    """Return a hash of everything that determines a base: initial weights, training code, libraries and steps."""
    code = [Path(module.__file__ or "") for module in (base_unet, base_vae, circles)]
    files = sorted(path for path in BASE.rglob("*") if path.is_file() and path.suffix in (".json", ".safetensors"))
    digest = hashlib.sha256(f"{num_steps} {version('torch')} {version('diffusers')} {version('transformers')}".encode())
    for path in [Path(__file__), *code, *files]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _build(family: str, num_steps: int, folder: Path, print_line: PrintLine) -> None:
    print_line(f"{family} base: {num_steps} steps on plain circles, from the weights of {BASE.name}")
    torch.manual_seed(0)
    base = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None, dtype=torch.float32)
    base.vae.requires_grad_(False)
    pipeline = build_v_prediction(base) if family == "sd2" else build_xl(base)
    samples = _samples(base.vae, base.tokenizer, min(_MAX_SAMPLES, num_steps * _BATCH_SIZE), family == "sdxl")
    _train(family, pipeline, samples, num_steps, print_line)
    pipeline.save_pretrained(folder, safe_serialization=True)
    for tokenizer in folder.glob("tokenizer*"):
        shutil.rmtree(tokenizer)
        shutil.copytree(BASE / "tokenizer", tokenizer)
    captions = circles.all_captions()[::_DRAWN]
    drawn = sample_images(pipeline, captions, num_inference_steps=15)
    right = sum(measure_picture(image).caption == caption for image, caption in zip(drawn, captions, strict=True))
    print_line(f"{family} base: {right} of {len(captions)} captions are drawn in the right colours")


def build_v_prediction(base: Any) -> Any:
    """Return a pipeline like SD 2.x: linear projections, heads by level, exact GELU in the text encoder, v target."""
    unet = _extend_unet(base.unet)
    text_encoder = _extend_text_encoder(CLIPTextModel, base.text_encoder, num_layers=3)
    scheduler = DDIMScheduler.from_config(base.scheduler.config, prediction_type="v_prediction")
    return StableDiffusionPipeline(
        vae=base.vae,
        text_encoder=text_encoder,
        tokenizer=base.tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_xl(base: Any) -> Any:
    """Return a pipeline like SDXL: the UNet gets the last but one layer of two text encoders, and the image's sizes."""
    width = base.text_encoder.config.hidden_size
    unet = _extend_unet(
        base.unet,
        cross_attention_dim=2 * width,
        addition_embed_type="text_time",
        addition_time_embed_dim=_SIZE_CHANNELS,
        projection_class_embeddings_input_dim=width + 6 * _SIZE_CHANNELS,
    )
    # Zero weights: the new embedding has no effect before training.
    torch.nn.init.zeros_(unet.add_embedding.linear_2.weight)
    torch.nn.init.zeros_(unet.add_embedding.linear_2.bias)
    return StableDiffusionXLPipeline(
        vae=base.vae,
        text_encoder=_extend_text_encoder(CLIPTextModel, base.text_encoder, num_layers=4, hidden_act="quick_gelu"),
        text_encoder_2=_extend_text_encoder(CLIPTextModelWithProjection, base.text_encoder, num_layers=4),
        tokenizer=base.tokenizer,
        tokenizer_2=base.tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler.from_config(base.scheduler.config),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def _extend_unet(unet: Any, **settings: Any) -> Any:
    """Return a UNet with other settings and the weights of this one; additional columns of matrices are zero."""
    heads = [unet.config.attention_head_dim] * len(unet.config.block_out_channels)
    changed = {"use_linear_projection": True, "attention_head_dim": heads, **settings}
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    extended = UNet2DConditionModel.from_config({**config, **changed})
    _copy_weights(unet.state_dict(), extended)
    return extended


def _extend_text_encoder(kind: Any, encoder: Any, num_layers: int, hidden_act: str = "gelu") -> Any:
    """Return a text encoder of `num_layers` layers with the weights of this one in its first layers."""
    settings = {"num_hidden_layers": num_layers, "hidden_act": hidden_act}
    extended = kind(CLIPTextConfig(**{**encoder.config.to_dict(), **settings}))
    core = getattr(extended, "text_model", extended)
    _copy_weights(getattr(encoder, "text_model", encoder).state_dict(), core)
    return extended


def _copy_weights(weights: Mapping[str, Tensor], module: torch.nn.Module) -> None:
    """Copy weights by name, also from 1 x 1 convolutions to linear layers and from matrices to wider ones."""
    for name, value in module.state_dict().items():
        old = weights.get(name)
        if old is None:
            continue
        if old.dim() > value.dim():
            old = old.flatten(1)
        value.zero_()
        value[tuple(slice(size) for size in old.shape)].copy_(old)


def _samples(vae: AutoencoderKL, tokenizer: CLIPTokenizer, count: int, cropped: bool) -> CirclePictures:
    """Return pictures of plain circles; with `cropped`, every second one is a crop of a larger picture."""
    random = torch.Generator().manual_seed(0)
    pixels, captions, sizes = [], [], []
    for index in range(count):
        scene = circles.make_scene(0, "train", index)
        side = int(torch.randint(IMAGE_SIZE, _MAX_SIZE + 1, (1,), generator=random)) if cropped and index % 2 else None
        side = side or IMAGE_SIZE
        top, left = torch.randint(side - IMAGE_SIZE + 1, (2,), generator=random).tolist()
        picture = circles.paint(scene, size=side).crop((left, top, left + IMAGE_SIZE, top + IMAGE_SIZE))
        pixels.append(base_vae.to_tensor(picture))
        captions.append(scene.caption)
        sizes.append([side, side, top, left, IMAGE_SIZE, IMAGE_SIZE])
    latents = base_vae.encode(vae, torch.stack(pixels)) * vae.config.scaling_factor
    return CirclePictures(latents, _token_ids(tokenizer, captions), torch.tensor(sizes, dtype=torch.float32))


def _token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    ids: Tensor = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids


def _train(family: str, pipeline: Any, samples: CirclePictures, num_steps: int, print_line: PrintLine) -> None:
    """Train UNet and text encoders together, in place."""
    conditions = _conditions if family == "sd2" else _conditions_xl
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    modules = [pipeline.unet, pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)]
    trained = [parameter for module in modules if module is not None for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, num_steps, pct_start=0.1)
    # Weights of the squared error of the noise. The error of v needs none: it contains this weighting.
    weights = base_unet.loss_weights(schedule.alphas_cumprod)
    for step in range(1, num_steps + 1):
        rows = torch.randint(len(samples.latents), (_BATCH_SIZE,))
        latents, noise = samples.latents[rows], torch.randn(_BATCH_SIZE, *samples.latents.shape[1:])
        timesteps = torch.randint(schedule.config.num_train_timesteps, (_BATCH_SIZE,))
        prediction = pipeline.unet(
            schedule.add_noise(latents, noise, timesteps), timesteps, **conditions(pipeline, samples, rows)
        ).sample
        if family == "sd2":
            losses = (prediction - schedule.get_velocity(latents, noise, timesteps)).square().mean((1, 2, 3))
        else:
            losses = weights[timesteps] * (prediction - noise).square().mean((1, 2, 3))
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(losses.mean())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        rates.step()
        if step % _SHOWN_EVERY == 0:
            print_line(f"{family} base: step {step} of {num_steps}, loss {losses.mean().item():.4f}")


def _conditions(pipeline: Any, samples: CirclePictures, rows: Tensor) -> dict[str, Any]:
    """Return the UNet's conditions; a share of the captions is replaced with the empty caption."""
    dropped = torch.rand(len(rows), 1) < _CAPTION_DROPOUT
    empty = _token_ids(pipeline.tokenizer, [""])
    ids = torch.where(dropped, empty, samples.token_ids[rows])
    return {"encoder_hidden_states": pipeline.text_encoder(ids).last_hidden_state}


def _conditions_xl(pipeline: Any, samples: CirclePictures, rows: Tensor) -> dict[str, Any]:
    """Return the UNet's conditions; a share of the text embeddings is replaced with zeros."""
    ids = samples.token_ids[rows]
    first, second = (
        encoder(ids, output_hidden_states=True) for encoder in (pipeline.text_encoder, pipeline.text_encoder_2)
    )
    kept = (torch.rand(len(rows), 1) >= _CAPTION_DROPOUT).float()
    hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    added = {"text_embeds": kept * second.text_embeds, "time_ids": samples.sizes[rows]}
    return {"encoder_hidden_states": kept.unsqueeze(-1) * hidden, "added_cond_kwargs": added}
