"""Writes the key sets of real models: `python -m tests.trainer.formats.make_keys`. The files are data of the tests."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from finetune_contract.input_spec import ModelSpec
from finetune_contract.outputs.spec import OutputSpec
from finetune_trainer.export.formats.about import About
from finetune_trainer.export.formats.kohya import to_kohya
from finetune_trainer.export.formats.write import write_format
from finetune_trainer.models.base import open_base
from finetune_trainer.models.layouts.original import CONTROL, controlnet_to_original, to_original
from finetune_trainer.models.layouts.trained import LowRank, TrainedEmbedding
from finetune_trainer.models.stable_diffusion import StableDiffusion
from finetune_trainer.models.stable_diffusion_xl import StableDiffusionXl
from finetune_trainer.models.text_names import portable_text_name
from finetune_trainer.weights.lazy import LazyTensor, read_file
from testing.trainer import tiny
from testing.trainer.real_sizes import lazy, make_controlnet, make_parts

FAMILIES = ("sd1", "sd2", "sdxl")
FOLDER = Path(__file__).parent / "keys"
RANK = 4
TOKEN = "<cat>"
EMBEDDING_FORMATS = ("diffusers", "webui", "comfyui")
_ADAPTED = re.compile(r"\.attentions\.|\.self_attn\.|\.mlp\.")
_SDXL: Any = SimpleNamespace(denoiser_name="unet", _layers_per_block=2)
_SD: Any = SimpleNamespace(denoiser_name="unet")
NAMES: dict[str, Callable[[str, str], str]] = {
    "sd1": partial(StableDiffusion.kohya_name, _SD),
    "sd2": partial(StableDiffusion.kohya_name, _SD),
    "sdxl": partial(StableDiffusionXl.kohya_name, _SDXL),
}
"""kohya's names by family. They depend on nothing else of a base."""


def original(family: str) -> dict[str, LazyTensor]:
    parts = make_parts(family)
    encoders = {name: lazy(part, is_text=True) for name, part in parts.items() if name.startswith("text")}
    return to_original(lazy(parts["unet"]), lazy(parts["vae"]), encoders, is_second=family == "sd2")


def controlnet(family: str) -> dict[str, LazyTensor]:
    return {CONTROL + name: value for name, value in controlnet_to_original(lazy(make_controlnet(family))).items()}


def kohya(family: str) -> dict[str, LazyTensor]:
    """Return a LoRA of rank 4 for the layers that kohya's scripts adapt by default."""
    layers = {}
    for part, module in make_parts(family).items():
        for name, layer in module.named_modules():
            key = name if part == "unet" else portable_text_name(name)
            if part != "vae" and _ADAPTED.search(key) and isinstance(layer, nn.Linear | nn.Conv2d):
                height, *rest = layer.weight.shape
                ones = [1] * (len(rest) - 1)
                layers[f"{part}.{key}"] = LowRank(_shaped(RANK, *rest), _shaped(height, RANK, *ones), RANK)
    return to_kohya(layers, NAMES[family])


def _shaped(*shape: int) -> LazyTensor:
    return LazyTensor(torch.float32, shape, lambda start, stop: torch.zeros(stop - start, *shape[1:]))


def embedding(family: str, folder: Path) -> list[str]:
    """Return a line for each tensor of an embedding of two vectors: its format, file, name and shape.

    Args:
        family: the family.
        folder: an empty folder. The files are written to it, below the name of their format.
    """
    base = open_base(ModelSpec(base=str(tiny.write_base(folder / "base", family=family))))
    parts = base.load_text_encoder(torch.device("meta")).parts
    sizes = {name: part.config.hidden_size for name, part in make_parts(family).items() if name.startswith("text")}
    vectors = {part.name: torch.full((2, sizes[part.name]), float(number)) for number, part in enumerate(parts)}
    trained = TrainedEmbedding(base, TOKEN, vectors, {part.name: part.webui_key for part in parts})
    lines = []
    for name in EMBEDDING_FORMATS:
        (folder / name).mkdir()
        output = OutputSpec.model_validate({"format": name, "to": "."})
        for file in write_format(trained, output, folder / name, About("cat")):
            lines += [f"{name} {file.name} {line}" for line in shapes(read_file(file))]
    return lines


def shapes(tensors: Mapping[str, LazyTensor]) -> list[str]:
    """Return a line for each tensor: its name and its shape."""
    return sorted(f"{name} {'x'.join(map(str, tensor.shape)) or 'scalar'}" for name, tensor in tensors.items())


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for family in FAMILIES:
        (FOLDER / f"{family}.txt").write_text("\n".join(shapes(original(family))) + "\n", encoding="utf-8")
        (FOLDER / f"{family}-kohya.txt").write_text("\n".join(shapes(kohya(family))) + "\n", encoding="utf-8")
        (FOLDER / f"{family}-controlnet.txt").write_text("\n".join(shapes(controlnet(family))) + "\n", encoding="utf-8")
        with tempfile.TemporaryDirectory() as folder:
            lines = embedding(family, Path(folder))
        (FOLDER / f"{family}-embedding.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
