"""Finding base models."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finetune_contract.spec import ModelSpec
from finetune_trainer.errors import ConfigError
from finetune_trainer.models.base import open_base


def test_the_vae_may_be_another(base: Path, tmp_path: Path) -> None:
    vae = shutil.copytree(base / "vae", tmp_path / "vae")
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.5}), encoding="utf-8")
    assert open_base(ModelSpec(base=str(base), vae=str(vae))).latent_scale == 0.5
    assert open_base(ModelSpec(base=str(base))).latent_scale == pytest.approx(0.18215)


def test_hub_ids_come_from_the_shared_cache(base: Path, tmp_path: Path) -> None:
    """A revision that was fetched before is found without the hub."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(base, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(commit, encoding="utf-8")
    code = (
        "import sys; from finetune_contract.spec import ModelSpec; from finetune_trainer.models.base import open_base\n"
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


def test_pickles_are_never_read(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(ConfigError, match=r"model\.bin is a pickle, which can run code when it is read; convert it"):
        open_base(ModelSpec(base=str(tmp_path / "model.bin")))


def test_weights_that_are_pickles_only_are_refused(base: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(base, tmp_path / "base")
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ConfigError, match=r"model\.base: the UNet of .*base cannot be read"):
        open_base(ModelSpec(base=str(copy))).load_unet(torch.float32)


def test_damaged_weights_are_named(base: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(base, tmp_path / "base")
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ConfigError, match=r"model\.base: the UNet of .*base cannot be read"):
        open_base(ModelSpec(base=str(copy))).load_unet(torch.float32)


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        (None, r"holds no model_index\.json; write a folder in diffusers' layout or a hub id"),
        ("{", r"model_index\.json cannot be read"),
        ("[]", r"model_index\.json is not a JSON object"),
        ('{"_class_name": "FluxPipeline"}', r"is a FluxPipeline, which is no known family; use one of Stable"),
    ],
)
def test_folders_that_are_no_base(tmp_path: Path, index: str | None, sentence: str) -> None:
    if index is not None:
        (tmp_path / "model_index.json").write_text(index, encoding="utf-8")
    with pytest.raises(ConfigError, match=sentence):
        open_base(ModelSpec(base=str(tmp_path)))
