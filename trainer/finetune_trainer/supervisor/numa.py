"""Memory policy of a rank: its pages come from the NUMA nodes of its cores.

No library is needed: the policy is one system call. Nodes are preferred, not required: a rank that needs more memory
than its node has continues with that of another one.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable, Sequence

_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}
_DEFAULT, _PREFERRED, _PREFERRED_MANY = 0, 1, 5
_BITS = 8 * ctypes.sizeof(ctypes.c_ulong)
_libc = ctypes.CDLL(None, use_errno=True)


def why_not_bindable() -> str:
    """Return why this process may not set a memory policy; empty if it may. Sets the default policy."""
    number = _SET_MEMPOLICY.get(platform.machine())
    if number is None:
        return f"unknown system call of {platform.machine()}"
    if _libc.syscall(number, _DEFAULT, None, 0) == 0:
        return ""
    return os.strerror(ctypes.get_errno())


def memory_binder(nodes: Sequence[int]) -> Callable[[], int]:
    """Return a function that binds the calling process to NUMA nodes: only a system call, for use after a fork.

    It returns 0 or -1, like the system call; the default policy of the kernel then applies, which takes the memory
    of the node on which a page is first used.
    """
    number = _SET_MEMPOLICY.get(platform.machine())
    if not nodes or number is None:
        return lambda: 0
    mask = (ctypes.c_ulong * (max(nodes) // _BITS + 1))()
    for node in nodes:
        mask[node // _BITS] |= 1 << (node % _BITS)
    mode = _PREFERRED if len(nodes) == 1 else _PREFERRED_MANY
    # The kernel reads one bit less than this number.
    size = ctypes.c_ulong(len(mask) * _BITS + 1)
    return lambda: int(_libc.syscall(number, mode, mask, size))
