"""Single-file bases: they have the weights of the folder that they were written from; other content is refused."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file
from torch import Tensor

from finetune_contract.input_spec import ModelSpec
from finetune_trainer.errors import ConfigError
from finetune_trainer.models.base import open_base
from finetune_trainer.models.original_names import original_name
from testing.trainer import tiny
from testing.trainer.ranks import Ranks
from tests.trainer.checkpoint.test_sharding import done

pytestmark = pytest.mark.trainer

_UNET = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "conv_norm_out": "out.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_OPEN_CLIP = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_model.encoder.layers.": "transformer.resblocks.",
    ".layer_norm1": ".ln_1",
    ".layer_norm2": ".ln_2",
    ".mlp.fc1": ".mlp.c_fc",
    ".mlp.fc2": ".mlp.c_proj",
    ".self_attn.": ".attn.",
}
"""Names in the original code of SDXL's second text encoder."""
_VAE_MIDDLE = {"resnets.0": "block_1", "attentions.0": "attn_1", "resnets.1": "block_2"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def to_original(pipeline: Any) -> dict[str, Tensor]:
    """Return the weights by the names of Stable Diffusion's original code."""
    state: dict[str, Tensor] = {}
    for name, value in pipeline.unet.state_dict().items():
        module, _, last = name.rpartition(".")
        module = _UNET.get(module) or original_name(module, pipeline.unet.config.layers_per_block)
        state[f"model.diffusion_model.{module}.{last}"] = value
    for name, value in pipeline.vae.state_dict().items():
        renamed = _vae_name(name, len(pipeline.vae.config.block_out_channels))
        is_projection = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", renamed)
        state[f"first_stage_model.{renamed}"] = value[..., None, None] if is_projection else value
    is_xl = hasattr(pipeline, "text_encoder_2")
    clip = "conditioner.embedders.0" if is_xl else "cond_stage_model"
    for name, value in pipeline.text_encoder.state_dict().items():
        state[f"{clip}.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    if is_xl:
        open_clip = to_open_clip(pipeline.text_encoder_2.state_dict())
        state |= {f"conditioner.embedders.1.model.{name}": value for name, value in open_clip.items()}
    return {name: value.clone().contiguous() for name, value in state.items()}


def to_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights by open_clip's names: query, key and value in one tensor, the projection transposed."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        new = name
        for ours, original in _OPEN_CLIP.items():
            new = new.replace(ours, original)
        if name == "text_projection.weight":
            renamed["text_projection"] = value.T
        elif match := re.fullmatch(r"(.*\.attn)\.q_proj\.(weight|bias)", new):
            parts = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            renamed[f"{match[1]}.in_proj_{match[2]}"] = torch.cat(parts)
        elif "k_proj" not in new and "v_proj" not in new:
            renamed[new] = value
    return renamed


def _vae_name(name: str, levels: int) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    middle = re.sub(r"mid_block\.(\w+\.\d+)\.", lambda match: f"mid.{_VAE_MIDDLE[match[1]]}.", name)
    for ours, original in _VAE_ATTENTION.items():
        middle = middle.replace(f"attn_1.{ours}.", f"attn_1.{original}.")
    down = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", middle)
    down = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", down)
    up = re.sub(
        r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}.block.{match[2]}", down
    )
    return re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda match: f"up.{levels - 1 - int(match[1])}.upsample", up)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_single_file_has_the_weights_of_its_folder(base: Path, tmp_path: Path, suffix: str) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    file = tmp_path / f"model{suffix}"
    state = to_original(pipeline)
    if suffix == ".ckpt":
        torch.save({"state_dict": state}, file)
    else:
        save_file(state, file)
    spec = ModelSpec(base=str(file), config=str(base))
    family = open_base(spec, tmp_path / "cache")
    for name, value in family.load_denoiser(torch.float32).state_dict().items():
        assert torch.equal(value, pipeline.unet.state_dict()[name]), name
    encoder = family.load_image_encoder(torch.device("cpu"))
    pixels = torch.rand(1, 3, 16, 16)
    expected = open_base(ModelSpec(base=str(base))).load_image_encoder(torch.device("cpu")).encode(pixels)
    torch.testing.assert_close(encoder.encode(pixels), expected)
    assert len(list((tmp_path / "cache" / "bases").iterdir())) == 1
    assert open_base(spec, tmp_path / "cache").denoiser_files() == family.denoiser_files()


@pytest.fixture(scope="module")
def xl_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SDXL whose text encoders have different widths, by which diffusers distinguishes them."""
    return tiny.write_base(tmp_path_factory.mktemp("xl") / "base", family="sdxl", second_width=2 * tiny.WIDTH)


def test_single_file_of_sdxl_trains_the_same_weights_as_its_folder(xl_base: Path, data: Path, tmp_path: Path) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(xl_base)
    file = tmp_path / "model.safetensors"
    save_file(to_original(pipeline), file)
    spec = tiny.make_spec(xl_base, data, steps=1)
    single = spec.model_copy(update={"model": ModelSpec(base=str(file), config=str(xl_base))})
    family = open_base(single.model, tmp_path / "cache")
    assert type(family) is type(open_base(spec.model))
    for name, value in family.load_denoiser(torch.float32).state_dict().items():
        assert torch.equal(value, pipeline.unet.state_dict()[name]), name
    trained = [done(Ranks(each, tmp_path / name / "job")) for name, each in (("single", single), ("folder", spec))]
    assert trained[0].weights() == trained[1].weights()


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("run",)


def test_pickle_with_more_than_weights_is_refused_and_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"x": torch.zeros(1)}, "more": _Bomb()}, file)
    with pytest.raises(ConfigError, match=r"model\.base: .*model\.ckpt contains more than weights"):
        open_base(ModelSpec(base=str(file)), tmp_path / "cache")
    assert capsys.readouterr().out == ""
    file.write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(ConfigError, match=r"model\.base: .*model\.ckpt"):
        open_base(ModelSpec(base=str(file)), tmp_path / "cache")
    assert capsys.readouterr().out == ""


def test_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x10" * 100)
    with pytest.raises(ConfigError, match=r"model\.base: .*model\.safetensors is not a readable checkpoint"):
        open_base(ModelSpec(base=str(tmp_path / "model.safetensors")), tmp_path / "cache")
