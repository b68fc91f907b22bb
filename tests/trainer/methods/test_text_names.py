"""Names of a text encoder's tensors: files that we write have the level `text_model`, which transformers 4 needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from finetune_contract.input_spec import ModelSpec
from finetune_trainer.models.base import open_base
from finetune_trainer.models.text_names import make_text_names_portable
from testing.trainer import tiny
from testing.trainer.methods import make_method
from tests.trainer.methods.test_exports import write

CIRCLES = Path(__file__).parents[3] / "examples/base-circles"
WEIGHTS = "model.safetensors"


def names(folder: Path) -> list[str]:
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return list(file.keys())


def loading_info(folder: Path) -> dict[str, Any]:
    """Return what the installed release of transformers does with the names in a folder."""
    _, info = CLIPTextModel.from_pretrained(folder, output_loading_info=True)
    return {name: list(value) for name, value in info.items() if name in ("missing_keys", "unexpected_keys")}


def with_bare_names(folder: Path) -> Path:
    """Rename the tensors as CLIPTextModel of transformers 5 names them, and store a path in the configuration."""
    tensors = load_file(folder / WEIGHTS)
    save_file({name.removeprefix("text_model."): value for name, value in tensors.items()}, folder / WEIGHTS)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_name_or_path": str(folder)}))
    return folder


@pytest.mark.parametrize("name", ["Full", "DreamBooth, text"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_exported_text_encoders_have_the_names_that_every_release_reads(family: str, name: str, tmp_path: Path) -> None:
    """Whether they are trained or copied from the base, and however the base names them."""
    base = tiny.write_base(tmp_path / "base", family=family)
    encoders = sorted(path.name for path in base.glob("text_encoder*"))
    for encoder in encoders:
        with_bare_names(base / encoder)
    folder = write(make_method(base, name), tmp_path)
    for encoder in encoders:
        assert all(each.startswith(("text_model.", "text_projection.")) for each in names(folder / encoder))
        weights, expected = load_file(folder / encoder / WEIGHTS), load_file(base / encoder / WEIGHTS)
        for each, value in expected.items():
            is_level = each != "text_projection.weight"
            assert torch.equal(weights["text_model." * is_level + each], value)
    assert loading_info(folder / "text_encoder") == {"missing_keys": [], "unexpected_keys": []}
    assert str(tmp_path) not in "".join(path.read_text() for path in folder.rglob("*.json"))


def test_base_of_the_examples_has_the_names_that_every_release_reads() -> None:
    assert all(name.startswith("text_model.") for name in names(CIRCLES / "text_encoder"))
    assert loading_info(CIRCLES / "text_encoder") == {"missing_keys": [], "unexpected_keys": []}


def test_index_of_a_sharded_encoder_is_renamed_with_its_tensors(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 4}, "weight_map": {"final_layer_norm.bias": "a"}}))
    save_file({"final_layer_norm.bias": torch.ones(1)}, tmp_path / WEIGHTS, {"format": "pt"})
    make_text_names_portable(tmp_path)
    assert json.loads(index.read_text())["weight_map"] == {"text_model.final_layer_norm.bias": "a"}
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert torch.equal(file.get_tensor("text_model.final_layer_norm.bias"), torch.ones(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == [WEIGHTS, index.name]


def test_renamed_base_gives_the_same_text_conditions(base: Path, tmp_path: Path) -> None:
    bare = tiny.write_base(tmp_path / "bare")
    with_bare_names(bare / "text_encoder")
    both = [
        open_base(ModelSpec(base=str(folder))).load_text_encoder(torch.device("cpu")).encode(["word"])["hidden"]
        for folder in (base, bare)
    ]
    assert torch.equal(*both)
