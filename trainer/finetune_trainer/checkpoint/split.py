"""Which rank writes which tensors of a checkpoint that all ranks hold alike. Pure; every rank gets the same answer."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

MIN_PART_BYTES = 64 * 1024 * 1024
"""Smaller parts are not worth a file and a word to rank 0."""
SUFFIX = ".safetensors"
_FILE = re.compile(r"(?P<group>.+?)(-\d{5}-of-\d{5})?\.safetensors")

Groups = Mapping[str, Mapping[str, Tensor]]


def num_parts(total_bytes: int, num_writers: int, min_part_bytes: int = MIN_PART_BYTES) -> int:
    """Into how many parts a checkpoint goes: one for each writer, fewer where they would be tiny."""
    return max(1, min(num_writers, total_bytes // min_part_bytes))


def take_part(groups: Groups, part: int, parts: int) -> dict[str, dict[str, Tensor]]:
    """The tensors of one part: in the order of their names, each goes where its middle byte falls.

    Args:
        groups: named groups of named tensors.
        part: number of the part, from 0.
        parts: number of parts.
    """
    total = max(1, total_bytes(groups))
    mine: dict[str, dict[str, Tensor]] = {}
    offset = 0
    for group in sorted(groups):
        for name in sorted(groups[group]):
            size = size_bytes(groups[group][name])
            # An empty tensor behind all others lies at the very end, which is in the last part too.
            if min((2 * offset + size) * parts // (2 * total), parts - 1) == part:
                mine.setdefault(group, {})[name] = groups[group][name]
            offset += size
    return mine


def total_bytes(groups: Groups) -> int:
    """Size of all tensors."""
    return sum(size_bytes(tensor) for tensors in groups.values() for tensor in tensors.values())


def size_bytes(tensor: Tensor) -> int:
    """Size of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def file_name(group: str, part: int, parts: int) -> str:
    """Name of the file of a group's tensors in one part."""
    return f"{group}{SUFFIX}" if parts == 1 else f"{group}-{part + 1:05d}-of-{parts:05d}{SUFFIX}"


def group_of(name: str) -> str | None:
    """The group whose tensors a file holds; None for a file that holds none."""
    match = _FILE.fullmatch(name)
    return match["group"] if match else None
