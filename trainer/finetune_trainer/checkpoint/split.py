"""Assigns the tensors of a replicated state to the ranks that write them. Pure; every rank gets the same result."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

MIN_PART_BYTES = 64 * 1024 * 1024
"""Smaller parts do not justify a separate file and a message to rank 0."""
SUFFIX = ".safetensors"
_FILE = re.compile(r"(?P<group>.+?)(-\d{5}-of-\d{5})?\.safetensors")

Groups = Mapping[str, Mapping[str, Tensor]]


def num_parts(total_bytes: int, num_writers: int, min_part_bytes: int = MIN_PART_BYTES) -> int:
    """Return the number of parts of a checkpoint: one for each writer, fewer if parts would be too small."""
    return max(1, min(num_writers, total_bytes // min_part_bytes))


def take_part(groups: Groups, part: int, parts: int) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of one part: in the order of names, each tensor goes to the part that its middle byte is in.

    Args:
        groups: named groups of named tensors.
        part: index of the part, from 0.
        parts: number of parts.
    """
    total = max(1, total_bytes(groups))
    mine: dict[str, dict[str, Tensor]] = {}
    offset = 0
    for group in sorted(groups):
        for name in sorted(groups[group]):
            size = size_bytes(groups[group][name])
            # An empty tensor after all others is at the very end, which belongs to the last part.
            if min((2 * offset + size) * parts // (2 * total), parts - 1) == part:
                mine.setdefault(group, {})[name] = groups[group][name]
            offset += size
    return mine


def total_bytes(groups: Groups) -> int:
    """Return the size of all tensors in bytes."""
    return sum(size_bytes(tensor) for tensors in groups.values() for tensor in tensors.values())


def size_bytes(tensor: Tensor) -> int:
    """Return the size of a tensor's elements in bytes."""
    return tensor.numel() * tensor.element_size()


def file_name(group: str, part: int, parts: int) -> str:
    """Return the file name of a group's tensors in one part."""
    return f"{group}{SUFFIX}" if parts == 1 else f"{group}-{part + 1:05d}-of-{parts:05d}{SUFFIX}"


def group_of(name: str) -> str | None:
    """Return the group whose tensors a file holds; None if it holds no tensors."""
    match = _FILE.fullmatch(name)
    return match["group"] if match else None
