"""Checks the paths of the model: base, config and VAE."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from finetune_contract.input_spec import ModelSpec
from finetune_operator.cli.manifest import is_hub_id, is_url

PICKLES = (".pt", ".bin", ".pth")
SINGLE_BASES = (".safetensors", ".ckpt")
"""Single files that the trainer accepts as a base. It reads only the weights of a .ckpt."""


def find_model_problems(model: ModelSpec) -> Iterator[str]:
    """Yield a message for every local path of the model that the trainer cannot use."""
    yield from _path_problems("spec.model.base", model.base)
    for field, part in (("config", model.config), ("vae", model.vae)):
        if part is not None:
            yield from _path_problems(f"spec.model.{field}", part)


def _path_problems(field: str, text: str) -> Iterator[str]:
    path = Path(text)
    if is_url(text) or (is_hub_id(text) and not path.is_absolute()):
        return
    if path.suffix in PICKLES:
        yield f"{field}: {path.name} is a pickle, which can run code when it is read; convert it to safetensors"
    elif path.is_file():
        if field.endswith("base") and path.suffix in SINGLE_BASES:
            return
        single = f"a {' or '.join(SINGLE_BASES)} file, " if field.endswith("base") else ""
        yield f"{field}: {path} is a single file; write {single}a folder in diffusers' layout or a hub id (owner/name)"
    elif not path.is_dir():
        yield f"{field}: {path} does not exist; write a folder in diffusers' layout or a hub id (owner/name)"
    elif field.endswith(("base", "config")) and not (path / "model_index.json").is_file():
        yield (
            f"{field}: {path} contains no model_index.json; write a folder in diffusers' layout or a hub id "
            "(owner/name)"
        )
    elif field.endswith("vae") and not (path / "config.json").is_file():
        yield f"{field}: {path} contains no config.json; write the folder of a VAE in diffusers' layout"
