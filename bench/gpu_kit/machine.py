"""Describes the machine: its device, the versions of its libraries, and whether a computation on the device works."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil

import torch

from bench.gpu_kit.bases import describe_device, gib
from bench.gpu_kit.items import Context
from testing.measure.device import measured_device, peak_flops

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft", "huggingface-hub", "triton", "bitsandbytes")


def machine(context: Context) -> None:
    """Record the machine. Fails if the device cannot compute."""
    device = measured_device()
    context.record.add(
        device=describe_device(),
        peak_flops=peak_flops(),
        python=platform.python_version(),
        cores=len(os.sched_getaffinity(0)),
        free_disk_gib=gib(shutil.disk_usage(context.folder).free),
        versions={name: _version(name) for name in LIBRARIES},
        has_bitsandbytes=importlib.util.find_spec("bitsandbytes") is not None,
    )
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        context.record.add(
            memory_gib=gib(properties.total_memory),
            capability=list(torch.cuda.get_device_capability(device)),
            cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        )
    product = torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)
    assert product.sum().item() == 64**3


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
