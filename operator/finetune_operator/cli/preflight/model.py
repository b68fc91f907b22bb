"""Checks the paths of the model: base, config and VAE."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from finetune_contract.bucket import PACKAGES, is_bucket_url
from finetune_contract.input_spec import ModelSpec
from finetune_contract.requirements import has_package
from finetune_operator.api.job import FineTuneJobSpec
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


def find_start_problems(spec: FineTuneJobSpec) -> Iterator[str]:
    """Yield a message for every local path that training starts from and that does not exist."""
    training, start = spec.training, spec.checkpoint.from_
    lora, inversion, controlnet = training.lora, training.textual_inversion, training.controlnet
    files = "write the path of a file or a folder, or a hub id (owner/name)"
    places = (
        ("training.lora.base", lora.base if lora else None, files),
        ("training.textualInversion.base", inversion.base if inversion else None, files),
        ("training.controlnet.base", controlnet.base if controlnet else None, files),
        ("checkpoint.from.path", start.path if start else None, "write the folder of a job or of a checkpoint"),
    )
    for field, text, remedy in places:
        if text is not None and Path(text).is_absolute() and not Path(text).exists():
            yield f"spec.{field}: {text} does not exist; {remedy}"


def find_missing_clients(spec: FineTuneJobSpec) -> Iterator[str]:
    """Yield a message for each object store whose Python package is not installed."""
    storage, controlnet = spec.checkpoint.storage, spec.training.controlnet
    places = {
        "spec.model.base": spec.model.base,
        "spec.model.vae": spec.model.vae,
        "spec.dataset.source": spec.dataset.source,
        "spec.training.controlnet.base": controlnet.base if controlnet else None,
        "spec.checkpoint.storage.bucket.url": storage.bucket.url if storage and storage.bucket else None,
    }
    for field, place in places.items():
        package = PACKAGES.get((place or "").partition("://")[0])
        if place and is_bucket_url(place) and package and not has_package(package):
            yield f"{field}: {place} needs the package {package}, which is not installed here; install it"


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
