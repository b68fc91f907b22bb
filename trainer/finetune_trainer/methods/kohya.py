"""Names of an adapter's tensors in the files of kohya's scripts."""

from __future__ import annotations

DORA_SCALE = ".dora_scale"
SUFFIXES = {
    ".lora_A.weight": ".lora_down.weight",
    ".lora_B.weight": ".lora_up.weight",
    ".lora_magnitude_vector": DORA_SCALE,
    ".lora_magnitude_vector.weight": DORA_SCALE,
}
"""kohya's suffixes of an adapter's tensors, by diffusers' suffixes."""
