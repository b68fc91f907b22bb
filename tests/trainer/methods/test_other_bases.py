"""Bases that differ from SD 1.5 in their VAE, their UNet or their noise process: read exactly, or refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from finetune_contract.input_spec import ModelSpec
from finetune_trainer.errors import ConfigError
from finetune_trainer.models.base import open_base
from finetune_trainer.models.family import Family
from testing.trainer import tiny
from testing.trainer.single_file import to_original

pytestmark = pytest.mark.trainer

MEAN, STD = [-1.5, 0.25, 2.0, 0.0], [8.5, 5.5, 0.5, 1.0]


@pytest.fixture(scope="module")
def xl_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_base(tmp_path_factory.mktemp("other") / "base", family="sdxl", second_width=2 * tiny.WIDTH)


def edited(base: Path, folder: Path, file: str, **fields: Any) -> Path:
    """Return a copy of a base with other fields in one of its JSON files."""
    copy = shutil.copytree(base, folder / "edited")
    values = json.loads((copy / file).read_text(encoding="utf-8"))
    (copy / file).write_text(json.dumps({**values, **fields}), encoding="utf-8")
    return copy


def open_folder(folder: Path, **model: Any) -> Family:
    return open_base(ModelSpec(base=str(folder), **model))


def test_vae_with_channel_statistics_gives_normalized_latents(xl_base: Path, tmp_path: Path) -> None:
    """As in Playground v2.5: the inverse of what the pipeline does before it decodes."""
    folder = edited(xl_base, tmp_path, "vae/config.json", latents_mean=MEAN, latents_std=STD, scaling_factor=0.5)
    family = open_folder(folder)
    latents = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(each).view(4, 1, 1) for each in (MEAN, STD))
    scaled = family.scale_latents(latents)
    torch.testing.assert_close(scaled, (latents - mean) * 0.5 / std)
    encoder = family.load_image_encoder(torch.device("cpu"))
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    with torch.no_grad():
        expected = vae.decode(latents[None, :, :, :3]).sample.clamp(-1, 1)
    torch.testing.assert_close(encoder.decode(scaled[None, :, :, :3]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"latents_mean": MEAN, "latents_std": STD},
            r"model\.vae: latents_mean and latents_std of the VAE are not",
        ),
        (
            {"shift_factor": 0.1},
            r"model\.vae: shift_factor 0\.1 of the VAE is not supported.*; use a VAE without",
        ),
    ],
)
def test_vae_that_pipelines_of_the_family_decode_differently_is_refused(
    base: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    vae = edited(base, tmp_path, "vae/config.json", **fields) / "vae"
    with pytest.raises(ConfigError, match=message):
        open_folder(base, vae=str(vae))


def test_half_of_the_channel_statistics_is_refused(xl_base: Path, tmp_path: Path) -> None:
    folder = edited(xl_base, tmp_path, "vae/config.json", latents_mean=MEAN)
    with pytest.raises(ConfigError, match=r"model\.base: latents_mean and latents_std of the VAE do not belong"):
        open_folder(folder)


@pytest.mark.parametrize(("field", "value"), [("in_channels", 9), ("out_channels", 8)])
def test_base_for_another_task_is_refused(base: Path, tmp_path: Path, field: str, value: int) -> None:
    folder = edited(base, tmp_path, "unet/config.json", **{field: value})
    with pytest.raises(ConfigError, match=rf"model\.base: {field} of its UNet is {value}, .*; use a text-to-image"):
        open_folder(folder)


@pytest.mark.parametrize(
    ("name", "process"),
    [("EDMDPMSolverMultistepScheduler", "EDM"), ("FlowMatchEulerDiscreteScheduler", "flow matching")],
)
def test_scheduler_of_the_index_is_refused_by_name(base: Path, tmp_path: Path, name: str, process: str) -> None:
    folder = edited(base, tmp_path, "model_index.json", scheduler=["diffusers", name])
    with pytest.raises(ConfigError, match=rf"model\.base: its scheduler {name} \({process}.*is not supported; use"):
        open_folder(folder)


def single_file(folder: Path, to: Path, *markers: str) -> ModelSpec:
    """Write a base as one file with empty tensors that mark its noise process."""
    from diffusers import StableDiffusionXLPipeline  # noqa: PLC0415  slow to import

    state = to_original(StableDiffusionXLPipeline.from_pretrained(folder))
    file = to / "model.safetensors"
    save_file({**state, **{marker: torch.zeros(1) for marker in markers}}, file)
    return ModelSpec(base=str(file), config=str(folder))


@pytest.mark.parametrize(("markers", "ends_at_zero"), [(("v_pred",), False), (("v_pred", "ztsnr"), True)])
def test_markers_of_a_single_file_select_v_prediction(
    xl_base: Path, tmp_path: Path, markers: tuple[str, ...], ends_at_zero: bool
) -> None:
    family = open_base(single_file(xl_base, tmp_path, *markers), tmp_path / "cache")
    latents, noise = torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)
    last = torch.tensor([family.objective.num_timesteps - 1])
    # In v the target of a sample without noise is -sqrt(1 - a) x_0; in epsilon it would be the noise, 0.
    assert (family.objective.target(latents, noise, last) < -0.9).all()
    assert (family.objective.add_noise(latents, noise, last) == 0).all() == ends_at_zero


@pytest.mark.parametrize("marker", ["edm_mean", "edm_vpred.sigma_max"])
def test_single_file_of_another_process_is_refused_before_it_is_converted(tmp_path: Path, marker: str) -> None:
    file = tmp_path / "model.safetensors"
    save_file({marker: torch.zeros(1), "weight": torch.zeros(1)}, file)
    with pytest.raises(ConfigError, match=rf"another noise process \(EDM.*it contains {marker}\), which is not"):
        open_base(ModelSpec(base=str(file)), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
