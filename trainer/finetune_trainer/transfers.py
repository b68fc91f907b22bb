"""Copies from the host to a GPU that the host does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device.

    A copy from pageable memory makes the host wait until the GPU has finished all earlier work. So the tensor is copied
    to pinned memory first, which torch frees when the GPU has read it.
    """
    if tensor.device == device:
        return tensor
    if device.type == "cuda" and tensor.is_cpu:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
