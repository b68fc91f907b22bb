"""A Stable Diffusion base with a few thousand random weights, a data set of a few images, and a run on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from finetune_contract.run_spec import RunSpec
from finetune_trainer.models.text_names import make_text_names_portable

RESOLUTION = 16
NUM_SAMPLES = 7
NUM_TOKENS = 8
WIDTH = 16


FAMILIES = ("sd1", "sd2", "sdxl")
"""Families of `write_base`: SD 1.x, SD 2.x (v-prediction, linear projections, heads per level), SDXL."""


def write_base(folder: Path, prediction_type: str = "epsilon", family: str = "sd1", second_width: int = WIDTH) -> Path:
    """Write the base model in diffusers' layout, with the same weights every time.

    Args:
        folder: where to write.
        prediction_type: the schedule's prediction type; SD 2.x always uses v-prediction.
        family: one of FAMILIES.
        second_width: width of SDXL's second text encoder.
    """
    torch.manual_seed(0)
    if family == "sd2":
        prediction_type = "v_prediction"
    is_xl = family == "sdxl"
    write_tokenizer(folder / "tokenizer")
    CLIPTextModel(text_config(2 if is_xl else 1)).save_pretrained(folder / "text_encoder")
    if is_xl:
        write_tokenizer(folder / "tokenizer_2")
        CLIPTextModelWithProjection(text_config(2, second_width)).save_pretrained(folder / "text_encoder_2")
    for encoder in folder.glob("text_encoder*"):
        # As in published bases, whatever the installed release writes.
        make_text_names_portable(encoder)
    AutoencoderKL(
        sample_size=RESOLUTION,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
    ).save_pretrained(folder / "vae")
    UNet2DConditionModel(
        sample_size=RESOLUTION // 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2) if family != "sd1" else 8,
        use_linear_projection=family != "sd1",
        norm_num_groups=4,
        **xl_config(is_xl, second_width),
    ).save_pretrained(folder / "unet")
    PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        skip_prk_steps=True,
        steps_offset=1,
    ).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.34.0",
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "requires_safety_checker": False,
    }
    if is_xl:
        del index["safety_checker"], index["requires_safety_checker"]
        index |= {
            "_class_name": "StableDiffusionXLPipeline",
            "force_zeros_for_empty_prompt": True,
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
        }
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def text_config(num_layers: int, width: int = WIDTH) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=514,
        max_position_embeddings=NUM_TOKENS,
        hidden_size=width,
        intermediate_size=width,
        projection_dim=width,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )


def xl_config(is_xl: bool, second_width: int = WIDTH) -> dict[str, Any]:
    if not is_xl:
        return {"cross_attention_dim": WIDTH}
    return {
        "cross_attention_dim": WIDTH + second_width,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": second_width + 6 * 8,
        "transformer_layers_per_block": (1, 2),
    }


def write_tokenizer(folder: Path) -> None:
    """Write CLIP's tokenizer without merges: every letter is a token."""
    folder.mkdir(parents=True)
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": NUM_TOKENS,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_data(folder: Path, num_samples: int = NUM_SAMPLES, size: tuple[int, int] = (RESOLUTION, RESOLUTION)) -> Path:
    """Write splits `train` and `test` of random images."""
    for number, split in enumerate(("train", "test")):
        random = np.random.default_rng(number)
        (folder / split).mkdir(parents=True)
        rows = []
        for index in range(num_samples):
            pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / split / f"{index}.png")
            Image.fromarray(pixels[:, :, ::-1]).save(folder / split / f"edges-{index}.png")
            row = {"file_name": f"{index}.png", "text": f"picture {index}", "edges": f"edges-{index}.png"}
            rows.append(json.dumps(row))
        (folder / split / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def make_spec(base: Path, data: Path, **training: Any) -> RunSpec:
    """Return a run of six steps with a global batch of four; `training` overrides settings, by their manifest names."""
    settings = {
        "method": "LoRA",
        "steps": 6,
        "batchSize": 2,
        "gradientAccumulation": 2,
        "learningRate": 1e-2,
        "resolution": RESOLUTION,
        **({"lora": {"rank": 2}} if "method" not in training else {}),
        **training,
    }
    columns = {"conditioning": "edges"} if settings["method"] == "ControlNet" else {}
    return RunSpec.model_validate(
        {
            "namespace": "default",
            "job": "tiny",
            "uid": "1f0c3a2b-0000-0000-0000-000000000000",
            "model": {"base": str(base)},
            "dataset": {"source": str(data), "columns": columns},
            "training": settings,
            "globalBatch": 4,
            "checkpointInterval": {"steps": 2},
        }
    )


def write_manifest(path: Path, spec: RunSpec) -> None:
    """Write the manifest of a job named tiny that trains as a run specification says."""
    training = spec.training.model_dump(mode="json", by_alias=True, exclude_unset=True)
    manifest = {
        "apiVersion": "finetune-operator.io/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "tiny"},
        "spec": {"model": {"base": spec.model.base}, "dataset": {"source": spec.dataset.source}, "training": training},
    }
    path.write_text(json.dumps(manifest))
