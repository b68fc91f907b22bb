"""A Flux base with a few thousand random weights, for scripts: no method of this project trains it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from testing.trainer import tiny

_CLIP_TOKENS = 77
"""Length to which Flux pads the prompts of its first text encoder."""
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def write_flux_base(folder: Path) -> Path:
    """Write the base in diffusers' layout, with the same weights every time."""
    torch.manual_seed(0)
    tiny.write_tokenizer(folder / "clip")
    text_config = tiny.text_config(1)
    text_config.max_position_embeddings = _CLIP_TOKENS
    t5_config = T5Config(
        vocab_size=len(_LETTERS) + 4, d_model=tiny.WIDTH, d_kv=8, d_ff=tiny.WIDTH, num_layers=1, num_heads=2
    )
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(
            latent_channels=4,
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=4,
            shift_factor=0.1,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=CLIPTextModel(text_config),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "clip", model_max_length=_CLIP_TOKENS),
        text_encoder_2=T5EncoderModel(t5_config),
        tokenizer_2=_t5_tokenizer(),
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=tiny.WIDTH,
            pooled_projection_dim=tiny.WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        ),
    ).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["tokenizer_2"] = ["transformers", "T5TokenizerFast"]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def _t5_tokenizer() -> PreTrainedTokenizerFast:
    """Return T5's tokenizer with a token for each letter."""
    special = ["<pad>", "</s>", "<unk>"]
    pieces = [(token, 0.0 if token in special else -1.0) for token in [*special, "\u2581", *_LETTERS]]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=special.index("<unk>")))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
