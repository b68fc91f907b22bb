"""Folders that other programs wrote are opened as what they contain, and written in any format."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from finetune_contract.input_spec import ModelSpec
from finetune_contract.outputs.spec import OutputFormat, OutputSpec
from finetune_trainer.errors import ConfigError
from finetune_trainer.export.formats.about import About
from finetune_trainer.export.formats.open import open_trained
from finetune_trainer.export.formats.write import write_format
from testing.trainer.methods import export, make_method

pytestmark = pytest.mark.trainer


@pytest.mark.parametrize(
    ("name", "output", "family"),
    [
        ("Full", "single-file", "sd1"),
        ("LoRA, text", "kohya", "sd1"),
        ("ControlNet", "single-file", "sd1"),
        ("TextualInversion", "webui", "sdxl"),
    ],
)
def test_a_folder_gives_the_file_that_the_method_itself_writes(
    bases: dict[str, Path], name: str, output: str, family: str, tmp_path: Path
) -> None:
    method = make_method(bases[family], name)
    folder, own, opened = (tmp_path / each for each in ("folder", "own", "opened"))
    for each in (folder, own, opened):
        each.mkdir()
    export(method, OutputFormat.DIFFUSERS, folder)
    (expected,) = export(method, OutputFormat(output), own)
    trained = open_trained(folder, ModelSpec(base=str(bases[family])))
    (found,) = write_format(trained, OutputSpec(format=OutputFormat(output), to="."), opened, About("tiny"))
    values, others = load_file(expected), load_file(found)
    assert values.keys() == others.keys()
    assert all(bool((others[key] == value).all()) for key, value in values.items())


def test_other_folders_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="its base is unknown"):
        open_trained(tmp_path)
    with pytest.raises(ConfigError, match="nor a LoRA nor an embedding; write format: asWritten"):
        open_trained(tmp_path, ModelSpec(base=str(bases["sd1"])))


def test_an_embedding_for_another_base_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    export(make_method(bases["sd1"], "TextualInversion"), OutputFormat.DIFFUSERS, tmp_path)
    with pytest.raises(ConfigError, match="contains embeddings for 1 of 2 text encoders"):
        open_trained(tmp_path, ModelSpec(base=str(bases["sdxl"])))
