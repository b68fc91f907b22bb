"""Opening of base models."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finetune_contract.input_spec import ModelSpec
from finetune_trainer.errors import ConfigError
from finetune_trainer.models.base import open_base


def test_model_vae_replaces_the_vae_of_the_base(base: Path, tmp_path: Path) -> None:
    vae = shutil.copytree(base / "vae", tmp_path / "vae")
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.5}), encoding="utf-8")
    assert open_base(ModelSpec(base=str(base), vae=str(vae))).scale_latents(torch.ones(())) == 0.5
    assert open_base(ModelSpec(base=str(base))).scale_latents(torch.ones(())) == pytest.approx(0.18215)


def test_hub_id_is_read_from_the_local_hub_cache(base: Path, tmp_path: Path) -> None:
    """A downloaded revision is found without network access; a missing one is refused."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(base, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(commit, encoding="utf-8")
    code = (
        "import sys; from finetune_contract.input_spec import ModelSpec\n"
        "from finetune_trainer.models.base import open_base\n"
        "print(open_base(ModelSpec(base=sys.argv[1], revision='v1')).image_encoder_files()[0])"
    )
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(
        [sys.executable, "-c", code, "org/tiny"], env=env, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == str(repository / "snapshots" / commit / "vae" / "config.json")
    missing = subprocess.run(
        [sys.executable, "-c", code, "org/other"], env=env, capture_output=True, text=True, check=False
    )
    assert "ConfigError: model.base: cannot fetch org/other at revision v1 from the hub" in missing.stderr


def test_pickle_base_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(ConfigError, match=r"model\.bin is a pickle, which can run code when it is read; convert it"):
        open_base(ModelSpec(base=str(tmp_path / "model.bin")))


def test_base_with_pickled_weights_only_is_refused(base: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(base, tmp_path / "base")
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ConfigError, match=r"model\.base: the UNet of .*base cannot be read"):
        open_base(ModelSpec(base=str(copy))).load_denoiser(torch.float32)


def test_damaged_weights_raise_config_error(base: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(base, tmp_path / "base")
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ConfigError, match=r"model\.base: the UNet of .*base cannot be read"):
        open_base(ModelSpec(base=str(copy))).load_denoiser(torch.float32)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, r"contains no model_index\.json; write a folder in diffusers' layout or a hub id"),
        ("{", r"model_index\.json cannot be read"),
        ("[]", r"model_index\.json is not a JSON object"),
        ('{"_class_name": "FluxPipeline"}', r"is a FluxPipeline, which is not supported; use one of Stable"),
    ],
)
def test_folder_without_a_supported_pipeline_is_refused(tmp_path: Path, index: str | None, message: str) -> None:
    if index is not None:
        (tmp_path / "model_index.json").write_text(index, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        open_base(ModelSpec(base=str(tmp_path)))
