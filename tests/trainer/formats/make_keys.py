"""Writes the key sets of real models: `python -m tests.trainer.formats.make_keys`. The files are data of the tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from finetune_trainer.models.layouts.original import CONTROL, controlnet_to_original, to_original
from finetune_trainer.weights.lazy import LazyTensor
from testing.trainer.real_sizes import lazy, make_controlnet, make_parts

FAMILIES = ("sd1", "sd2", "sdxl")
FOLDER = Path(__file__).parent / "keys"


def original(family: str) -> dict[str, LazyTensor]:
    parts = make_parts(family)
    encoders = {name: lazy(part, is_text=True) for name, part in parts.items() if name.startswith("text")}
    return to_original(lazy(parts["unet"]), lazy(parts["vae"]), encoders, is_second=family == "sd2")


def controlnet(family: str) -> dict[str, LazyTensor]:
    return {CONTROL + name: value for name, value in controlnet_to_original(lazy(make_controlnet(family))).items()}


def shapes(tensors: Mapping[str, LazyTensor]) -> list[str]:
    """Return a line for each tensor: its name and its shape."""
    return sorted(f"{name} {'x'.join(map(str, tensor.shape)) or 'scalar'}" for name, tensor in tensors.items())


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for family in FAMILIES:
        (FOLDER / f"{family}.txt").write_text("\n".join(shapes(original(family))) + "\n", encoding="utf-8")
        (FOLDER / f"{family}-controlnet.txt").write_text("\n".join(shapes(controlnet(family))) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
