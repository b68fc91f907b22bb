"""Settings of torch's libraries on GPUs."""

from __future__ import annotations

import torch

from finetune_contract.spec import Precision


def set_up_gpu(device: torch.device, precision: Precision) -> None:
    """Let cuDNN measure its convolutions, and choose how exact fp32 products are. Does nothing on CPUs.

    cuDNN measures each shape once per process. Two attempts may choose different algorithms, so that a resumed run on
    a GPU equals an undisturbed one up to rounding, not bit by bit.
    """
    if device.type != "cuda":
        return
    torch.backends.cudnn.benchmark = True
    # With precision fp32 the user asks for exact products. In 16 bits, what remains in fp32 may use TF32.
    allows_tf32 = precision is not Precision.FP32
    torch.backends.cudnn.allow_tf32 = allows_tf32
    torch.set_float32_matmul_precision("high" if allows_tf32 else "highest")
