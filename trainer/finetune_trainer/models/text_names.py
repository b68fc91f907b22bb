"""Names of the tensors of CLIP text encoders in files that every release of transformers reads.

The names in published bases start with `text_model`. CLIPTextModel of transformers 5 has no module of this name and
writes names without it. transformers 4 does not find these: it initializes the weights randomly and only warns.
transformers 5 reads both. Called where a pipeline or an adapter is written.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from finetune_trainer.tensor_file import copy_renamed

_LEVEL = "text_model."
_BELOW_LEVEL = ("embeddings.", "encoder.", "final_layer_norm.")
_INDEX_INFIX = ".safetensors.index."


def portable_text_name(name: str) -> str:
    """Return the name of a tensor or module of a CLIP text encoder with the level `text_model`."""
    return _LEVEL + name if name.startswith(_BELOW_LEVEL) else name


def copy_text_file(source: Path, target: Path) -> None:
    """Copy a file of a text encoder's folder; names of tensors in it become portable.

    Raises:
        OSError: a file cannot be read or written.
    """
    if source.suffix == ".safetensors":
        copy_renamed(source, target, portable_text_name)
    elif _INDEX_INFIX in source.name:
        index = json.loads(source.read_text(encoding="utf-8"))
        index["weight_map"] = {portable_text_name(name): file for name, file in index["weight_map"].items()}
        target.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    else:
        shutil.copyfile(source, target)


def make_text_names_portable(folder: Path) -> None:
    """Rename the tensors in the files of a text encoder's folder.

    Raises:
        OSError: a file cannot be read or written.
    """
    for path in sorted(folder.glob("*.safetensors*")):
        temporary = path.with_name(f".{path.name}")
        copy_text_file(path, temporary)
        temporary.replace(path)
