"""A reader of kohya's LoRA files as ComfyUI and the web UIs read them: it adds each adapter to the weight of its layer.

Each layer has the names under which these programs look for its adapter: the name in the original code of Stable
Diffusion, which a single-file base gives, and, except for SDXL in kohya's scripts, the name in diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

_UNET = "model.diffusion_model."


def merge_kohya(pipeline: Any, file: Path, original: Path) -> None:
    """Add all adapters of a file to the weights of a pipeline.

    Raises:
        ValueError: a tensor of the file has no layer, or not the shape that its layer needs.
    """
    tensors = load_file(file)
    layers = dict(_layers(pipeline, original))
    used: set[str] = set()
    for key in sorted({name.partition(".")[0] for name in tensors}):
        if key not in layers:
            raise ValueError(f"no layer is named {key}")
        parts = {name.partition(".")[2]: value for name, value in tensors.items() if name.startswith(f"{key}.")}
        _merge(key, layers[key].get_parameter("weight").data, parts)
        used |= {f"{key}.{part}" for part in parts}
    if used != set(tensors):
        raise ValueError(f"not read: {', '.join(sorted(set(tensors) - used))}")


def _merge(key: str, weight: Tensor, parts: dict[str, Tensor]) -> None:
    known = {"lora_up.weight", "lora_down.weight", "alpha", "dora_scale"}
    if not set(parts) <= known or not known - {"dora_scale"} <= set(parts):
        raise ValueError(f"{key} has {', '.join(sorted(parts))}")
    up, down = parts["lora_up.weight"], parts["lora_down.weight"]
    change = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape) * (parts["alpha"].item() / len(down))
    merged = weight + change
    if (scale := parts.get("dora_scale")) is not None:
        expected = (len(weight), *[1] * (weight.dim() - 1))
        if tuple(scale.shape) != expected:
            raise ValueError(f"{key}.dora_scale has the shape {tuple(scale.shape)} instead of {expected}")
        # As in LyCORIS: the norm of each output channel of the merged weight.
        merged *= scale / merged.flatten(1).norm(dim=1).reshape(expected)
    weight.copy_(merged)


def _layers(pipeline: Any, original: Path) -> Iterator[tuple[str, nn.Module]]:
    """Yield the names of each layer that can have an adapter."""
    is_xl = hasattr(pipeline, "text_encoder_2")
    names = {
        _fingerprint(value): name.removeprefix(_UNET).removesuffix(".weight")
        for name, value in load_file(original).items()
        if name.startswith(_UNET) and name.endswith(".weight")
    }
    for name, module in pipeline.unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            yield f"lora_unet_{_flat(names[_fingerprint(module.weight)])}", module
            if not is_xl:
                yield f"lora_unet_{_flat(name)}", module
    encoders = {"lora_te1": "text_encoder", "lora_te2": "text_encoder_2"} if is_xl else {"lora_te": "text_encoder"}
    for prefix, encoder in encoders.items():
        for name, module in getattr(pipeline, encoder).named_modules():
            inner = re.sub(r"^text_model\.", "", name)
            if isinstance(module, nn.Linear) and inner.startswith("encoder."):
                yield f"{prefix}_text_model_{_flat(inner)}", module


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _fingerprint(weight: Tensor) -> bytes:
    return weight.detach().to(torch.float32).contiguous().numpy().tobytes()
