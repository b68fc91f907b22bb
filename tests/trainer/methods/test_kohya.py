"""kohya's files: the shapes, names and metadata that ComfyUI, the web UIs and kohya's scripts expect."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor, nn

from finetune_contract.input_spec import ModelSpec
from finetune_contract.outputs.spec import OutputFormat
from finetune_trainer.export.formats.kohya import to_kohya
from finetune_trainer.models.base import open_base
from finetune_trainer.models.layouts.trained import LowRank
from finetune_trainer.models.original_names import original_name
from finetune_trainer.weights.lazy import LazyTensor, in_memory
from testing.trainer import tiny
from testing.trainer.methods import export, make_method


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118  not a dict


def test_magnitudes_have_the_shape_that_multiplies_the_weight_of_their_layer() -> None:
    """LyCORIS and ComfyUI divide them by norms: (out, 1) for a linear layer, (out, 1, 1, 1) for a convolution."""

    def ones(*shape: int) -> LazyTensor:
        return in_memory(torch.ones(shape))

    layers = {
        "unet.a.to_q": LowRank(ones(2, 5), ones(3, 2), 3, torch.arange(3.0)),
        "unet.b.conv1": LowRank(ones(2, 5, 3, 3), ones(3, 2, 1, 1), 3, torch.arange(3.0).view(1, 3, 1, 1)),
        "text_encoder.q_proj": LowRank(ones(2, 6), ones(4, 2), 3, torch.arange(4.0)),
    }
    renamed = to_kohya(layers, lambda part, module: f"{part}_{module.replace('.', '_')}")
    assert {name: tuple(value.shape) for name, value in renamed.items()} == {
        "unet_a_to_q.lora_down.weight": (2, 5),
        "unet_a_to_q.lora_up.weight": (3, 2),
        "unet_a_to_q.dora_scale": (3, 1),
        "unet_a_to_q.alpha": (),
        "unet_b_conv1.lora_down.weight": (2, 5, 3, 3),
        "unet_b_conv1.lora_up.weight": (3, 2, 1, 1),
        "unet_b_conv1.dora_scale": (3, 1, 1, 1),
        "unet_b_conv1.alpha": (),
        "text_encoder_q_proj.dora_scale": (4, 1),
        "text_encoder_q_proj.lora_down.weight": (2, 6),
        "text_encoder_q_proj.lora_up.weight": (4, 2),
        "text_encoder_q_proj.alpha": (),
    }
    assert renamed["unet_b_conv1.dora_scale"].read().flatten().tolist() == [0, 1, 2]
    assert all(value.read().item() == 3 for name, value in renamed.items() if name.endswith(".alpha"))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_exported_magnitudes_equal_the_norms_of_the_frozen_weights_before_training(
    bases: dict[str, Path], family: str, tmp_path: Path
) -> None:
    lora = {"rank": 2, "useDora": True, "targetModules": ["to_q", "conv1"]}
    (file,) = export(make_method(bases[family], "LoRA", lora=lora), OutputFormat.WEBUI, tmp_path)
    tensors, _ = read(file)
    weights = {
        open_base(ModelSpec(base=str(bases[family]))).kohya_name("unet", name): module.weight
        for name, module in UNet2DConditionModel.from_pretrained(bases[family] / "unet").named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    scales = {name: value for name, value in tensors.items() if name.endswith(".dora_scale")}
    assert len(scales) == len([name for name in tensors if name.endswith(".lora_up.weight")])
    for name, scale in scales.items():
        weight = weights[name.removesuffix(".dora_scale")]
        norms = weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.dim() - 1))
        torch.testing.assert_close(scale, norms)


@pytest.mark.parametrize(("family", "version"), [("sd1", "sd_v1"), ("sd2", "sd_v2"), ("sdxl", "sdxl_base_v1-0")])
def test_metadata_names_the_base_by_which_web_uis_list_the_file(
    bases: dict[str, Path], family: str, version: str, tmp_path: Path
) -> None:
    (file,) = export(make_method(bases[family], "LoRA"), OutputFormat.KOHYA, tmp_path)
    _, metadata = read(file)
    assert metadata["ss_base_model_version"] == version
    assert metadata["ss_v2"] == str(family == "sd2")
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("2", "6")


def test_modules_outside_the_blocks_have_the_names_of_the_original_code() -> None:
    assert original_name("time_embedding.linear_2", 2) == "time_embed.2"
    assert original_name("add_embedding.linear_1", 2) == "label_emb.0.0"
    assert original_name("conv_out", 2) == "out.2"


def test_names_for_the_full_size_sdxl_are_those_of_its_published_adapters() -> None:
    """Positions of the blocks depend on the number of levels and layers, which the tiny bases do not have."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
        )
    adapted = {name for name, _ in unet.named_modules() if name.endswith(("to_q", "proj_in"))}
    blocks = {original_name(name, 2).partition(".transformer_blocks")[0].removesuffix(".proj_in") for name in adapted}
    assert blocks == {
        *(f"input_blocks.{number}.1" for number in (4, 5, 7, 8)),
        "middle_block.1",
        *(f"output_blocks.{number}.1" for number in range(6)),
    }
    depths = [original_name(name, 2) for name in adapted if name.endswith("attn1.to_q")]
    assert len(depths) == len(set(depths)) == 70
