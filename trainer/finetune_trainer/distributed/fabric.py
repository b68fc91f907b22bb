"""Checks that the image has the library of the pods' network adapters. Without it NCCL uses TCP and reports nothing."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping

PLUGIN = "libnccl-net.so"
"""NCCL loads a network plugin by this name; aws-ofi-nccl installs it."""


def missing_plugin(env: Mapping[str, str], load: Callable[[str], object] = ctypes.CDLL) -> str | None:
    """Return a warning if the pods have Elastic Fabric Adapters that NCCL cannot use.

    Args:
        env: the rank's environment; the operator sets FI_PROVIDER.
        load: loads a shared library by its name, as NCCL does.
    """
    if env.get("FI_PROVIDER") != "efa" or "NCCL_NET_PLUGIN" in env:
        return None
    try:
        load(PLUGIN)
    except OSError as error:
        return (
            f"topology.resources: the pods request vpc.amazonaws.com/efa, but the trainer image has no {PLUGIN}, so "
            f"the ranks use TCP ({error}); use an image that is built with --build-arg EFA=1, or leave the adapters out"
        )
    return None
