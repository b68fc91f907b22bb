"""Embedding files that a textual inversion starts from: those of diffusers (`learned_embeds`) and of the web UIs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from finetune_contract.spec import TextualInversionSpec
from finetune_trainer.errors import ConfigError

FIELD = "training.textualInversion.base"
SUFFIXES = (".safetensors", ".bin", ".pt")
_OF_WEB_UI = "string_to_param"
_DIFFUSERS_NAME = "learned_embeds"


def find_embedding_files(folder: Path) -> list[Path]:
    """Return the embedding files in a folder, that of the first text encoder first.

    Args:
        folder: the folder, or a file itself.

    Raises:
        ConfigError: there are none, or it is not clear which one is meant.
    """
    if folder.is_file():
        return [folder]
    named = {path.stem: path for suffix in reversed(SUFFIXES) for path in folder.glob(f"{_DIFFUSERS_NAME}*{suffix}")}
    if _DIFFUSERS_NAME in named:
        return [named[name] for name in (_DIFFUSERS_NAME, f"{_DIFFUSERS_NAME}_2") if name in named]
    others = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if len(others) == 1:
        return others
    raise ConfigError(
        f"{FIELD}: {folder} contains no {_DIFFUSERS_NAME} file and {len(others)} other files; write the path of one "
        "file"
    )


def check_embedding_files(files: list[Path], spec: TextualInversionSpec) -> None:
    """Check embedding files against the settings, as far as this is possible without the base.

    Raises:
        ConfigError: they are no embeddings, or have another number of vectors.
    """
    for path in files:
        for vectors in read_embeddings(path).values():
            _check_count(vectors, path, spec)


def select_embedding(  # noqa: PLR0913, PLR0917  each names one property of the encoder
    files: list[Path], spec: TextualInversionSpec, part: str, number: int, webui_key: str, width: int
) -> Tensor:
    """Return the vectors (k, width) of one text encoder, float32.

    Args:
        files: the files, in the order of the text encoders if there are several.
        spec: the settings.
        part: folder of the text encoder.
        number: its number, from 0.
        webui_key: name of its vectors in the web UIs' files.
        width: width of its embedding table.

    Raises:
        ConfigError: the files have no such vectors.
    """
    path = files[min(number, len(files) - 1)]
    found = read_embeddings(path)
    vectors = found.get(webui_key)
    if vectors is None and len(found) == 1 and (number == 0 or len(files) > 1):
        (vectors,) = found.values()
    if vectors is None or vectors.shape[1] != width:
        widths = ", ".join(str(each.shape[1]) for each in found.values())
        raise ConfigError(
            f"{FIELD}: {path} has no vectors of width {width} for the base's {part} (it has {widths}); write the "
            "folder with the files of all text encoders of the same kind of base"
        )
    _check_count(vectors, path, spec)
    return vectors.float()


def read_embeddings(path: Path, field: str = FIELD) -> dict[str, Tensor]:
    """Return the vectors (k, width) in a file by their names.

    Args:
        path: the file.
        field: the field of the manifest that names it, for messages.

    Raises:
        ConfigError: it is not an embedding file.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{field}: {path} has none of the suffixes {', '.join(SUFFIXES)}; write an embedding file")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            # This reader refuses everything else that a pickle can contain.
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError) as error:
        raise ConfigError(
            f"{field}: {path} cannot be read: {' '.join(str(error).split())[:200]}; write a complete embedding file"
        ) from error
    except Exception as error:
        # The error class of pickle: some object in the file is not a weight.
        raise ConfigError(
            f"{field}: {path} contains more than weights, which can run code when it is read; write a .safetensors file"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get(_OF_WEB_UI), Mapping):
        content = content[_OF_WEB_UI]
    tensors = content if isinstance(content, Mapping) else {}
    found = {
        str(name): value.detach() if value.dim() == 2 else value.detach().unsqueeze(0)
        for name, value in tensors.items()
        if isinstance(value, Tensor) and value.dim() in (1, 2)
    }
    if not found or len(found) != len(tensors):
        raise ConfigError(f"{field}: {path} is not an embedding file; write one of diffusers or of a web UI")
    return found


def _check_count(vectors: Tensor, path: Path, spec: TextualInversionSpec) -> None:
    if len(vectors) != spec.num_vectors:
        raise ConfigError(
            f"{FIELD}: {path} has {len(vectors)} vectors, and numVectors is {spec.num_vectors}; write numVectors: "
            f"{len(vectors)}"
        )
