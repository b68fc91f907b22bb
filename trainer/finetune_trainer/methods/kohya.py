"""LoRA files with the names of kohya's scripts, which the web UIs and ComfyUI read. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

_SUFFIXES = {
    ".lora_A.weight": ".lora_down.weight",
    ".lora_B.weight": ".lora_up.weight",
    ".lora_magnitude_vector": ".dora_scale",
    ".lora_magnitude_vector.weight": ".dora_scale",
}


def to_kohya(state: Mapping[str, Tensor], alpha: float, name_of: Callable[[str, str], str]) -> dict[str, Tensor]:
    """Return adapters under kohya's names, with the alpha of each.

    Args:
        state: tensors by diffusers' names, prefixed by the denoiser's or a text encoder's name.
        alpha: LoRA's alpha.
        name_of: returns kohya's name of a module from the part's name and the module's name; see `Family.kohya_name`.
    """
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        suffix = next(suffix for suffix in sorted(_SUFFIXES, key=len, reverse=True) if name.endswith(suffix))
        part, _, module = name.removesuffix(suffix).partition(".")
        key = name_of(part, module)
        renamed[key + _SUFFIXES[suffix]] = value
        renamed[f"{key}.alpha"] = torch.tensor(float(alpha))
    return renamed
