"""LoRA files with the names of kohya's scripts, which the web UIs and ComfyUI read. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

DORA_SCALE = ".dora_scale"
SUFFIXES = {
    ".lora_A.weight": ".lora_down.weight",
    ".lora_B.weight": ".lora_up.weight",
    ".lora_magnitude_vector": DORA_SCALE,
    ".lora_magnitude_vector.weight": DORA_SCALE,
}
"""kohya's suffixes of an adapter's tensors, by diffusers' suffixes."""


def to_kohya(state: Mapping[str, Tensor], alpha: float, name_of: Callable[[str, str], str]) -> dict[str, Tensor]:
    """Return adapters under kohya's names, with the alpha of each.

    Args:
        state: tensors by diffusers' names, prefixed by the denoiser's or a text encoder's name.
        alpha: LoRA's alpha.
        name_of: returns kohya's name of a module from the part's name and the module's name; see `Family.kohya_name`.
    """
    renamed: dict[str, Tensor] = {}
    dimensions: dict[str, int] = {}
    for name, value in state.items():
        suffix = next(suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(suffix))
        part, _, module = name.removesuffix(suffix).partition(".")
        key = name_of(part, module)
        renamed[key + SUFFIXES[suffix]] = value
        renamed[f"{key}.alpha"] = torch.tensor(float(alpha))
        if suffix == ".lora_B.weight":
            dimensions[key] = value.dim()
    return {
        name: _dora_scale(value, dimensions[name.removesuffix(DORA_SCALE)]) if name.endswith(DORA_SCALE) else value
        for name, value in renamed.items()
    }


def kohya_metadata(base_version: str, rank: int, alpha: float) -> dict[str, str]:
    """Return the metadata by which readers find the base of a LoRA file.

    Without it the web UI takes every file for one of SD 1.x, and does not list it for SDXL.

    Args:
        base_version: version of the base; see `Family.kohya_base_version`.
        rank: LoRA's rank.
        alpha: LoRA's alpha.
    """
    return {
        "format": "pt",
        "ss_base_model_version": base_version,
        "ss_network_alpha": f"{alpha:g}",
        "ss_network_dim": str(rank),
        "ss_network_module": "networks.lora",
        "ss_v2": str(base_version.startswith("sd_v2")),
    }


def _dora_scale(magnitudes: Tensor, num_dimensions: int) -> Tensor:
    """Return DoRA's magnitudes of the output channels in the shape that multiplies the layer's weight.

    Readers divide them by norms of shape (out, 1) or (out, 1, 1, 1). A shape of (out,) would be broadcast along the
    wrong axis.
    """
    return magnitudes.reshape(-1, *[1] * (num_dimensions - 1))
