"""The C library's heap, told to keep what is freed: a step frees what the next one asks for again.

glibc takes every large block from the kernel and gives it back at once. The kernel fills its pages with zeros, one by
one, when they are touched: a third of a step of full fine-tuning on CPUs (docs/methods.md, "Speed and memory").
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4
_TOP_PAD_BYTES = 64 * 1024 * 1024
"""What is asked for beyond what is needed, so that growing is seldom."""


def keep_freed(env: Mapping[str, str]) -> bool:
    """Keep what is freed in this process from now on, unless the environment has settings of its own (MALLOC_*).

    Returns:
        Whether that is so: other C libraries have no such settings.
    """
    if any(name.startswith("MALLOC_") for name in env):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _TOP_PAD_BYTES))
    return all(mallopt(name, value) for name, value in settings)


def give_back() -> None:
    """Give back to the kernel what is free now, as between two parts of a run that have little in common."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
