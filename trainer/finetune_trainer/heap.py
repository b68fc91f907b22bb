"""Settings of the C library's heap that keep freed memory in the process: the next step allocates it again.

By default glibc requests every large block from the kernel and returns it when it is freed. The kernel fills the pages
with zeros one by one at the first access, which takes a third of a step of full fine-tuning on CPUs (docs/methods.md,
"Speed and memory").
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4
_TOP_PAD_BYTES = 64 * 1024 * 1024
"""Extra memory that each growth of the heap requests, so that it grows rarely."""


def keep_freed_memory(env: Mapping[str, str]) -> bool:
    """Keep freed memory in this process from now on, unless the environment has its own settings (MALLOC_*).

    Returns:
        Whether the settings apply: other C libraries do not have them.
    """
    if any(name.startswith("MALLOC_") for name in env):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _TOP_PAD_BYTES))
    return all(mallopt(name, value) for name, value in settings)


def release_free_memory() -> None:
    """Return the free memory to the kernel. Call it between two phases of a run that need different memory."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
