"""IPEX, if this environment has it. Its import changes operations of torch in the whole process and takes seconds."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from finetune_trainer.errors import ConfigError
from finetune_trainer.libraries import IPEX, import_ipex

FIELD = "topology.cpu.ipex"


def unavailable_reason() -> str:
    """Return why IPEX cannot be used here; empty if it can be. Does not import it."""
    if importlib.util.find_spec(IPEX) is None:
        return "this image does not contain IPEX (intel_extension_for_pytorch)"
    built_for, installed = _minor(ipex_version()), _minor(torch.__version__)
    if built_for != installed:
        return f"IPEX {built_for} needs torch {built_for}, and this image has torch {installed}"
    return ""


def ipex_version() -> str:
    """Return the version of the installed IPEX; empty without it."""
    try:
        return importlib.metadata.version(IPEX)
    except importlib.metadata.PackageNotFoundError:
        return ""


def load_ipex() -> Any:
    """Import IPEX and return it.

    Raises:
        ConfigError: it is not installed, or does not fit to torch or to the processor.
    """
    if reason := unavailable_reason():
        raise ConfigError(f"{FIELD}: {reason}; use the image trainer-cpu-intel, or write ipex: auto")
    try:
        return import_ipex()
    except (ImportError, OSError, RuntimeError) as error:
        # It checks the instructions of the processor during its import.
        summary = " ".join(str(error).split())[:300]
        raise ConfigError(f"{FIELD}: IPEX cannot be loaded: {summary}; write ipex: off") from error


def optimize_layers(layers: Sequence[nn.Module], optimizer: torch.optim.Optimizer | None) -> list[Any]:
    """Return IPEX's counterparts of layers, with weights packed in its own layout. Layers without one are returned.

    Args:
        layers: linear layers and convolutions, in the number format of the forward pass. Their weights are packed in
            place.
        optimizer: the optimizer of trained layers; None: they are frozen.
    """
    # Only these layers, and not the whole model: IPEX would also convert embeddings and layers whose weights are read
    # outside of them.
    group = nn.ModuleList(layers).train(optimizer is not None)
    settings: dict[str, Any] = {
        "inplace": True,
        "conv_bn_folding": False,
        "linear_bn_folding": False,
        # oneDNN for fp32 linear layers, too: IPEX's other implementation computes no gradients.
        "auto_kernel_selection": True,
        # IPEX fuses the updates of none of our optimizers; torch's AdamW is fused already.
        "fuse_update_step": False,
        "split_master_weight_for_bf16": False,
    }
    if optimizer is None:
        return list(load_ipex().optimize(group, **settings))
    optimized, _ = load_ipex().optimize(group, optimizer=optimizer, **settings)
    return list(optimized)


def _minor(version: str) -> str:
    return ".".join(version.split("+", maxsplit=1)[0].split(".")[:2])
