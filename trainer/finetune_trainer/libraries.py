"""The large libraries below the trainer: their settings, which they read when they are imported, and their import."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping

from finetune_contract import environment

HEAVY = (
    "finetune_trainer.train.run",
    "accelerate",
    "diffusers.models",
    "diffusers.optimization",
    "peft.utils",
)
"""Modules that every rank imports sooner or later, seconds each."""
LAZY = (
    ("diffusers", "AutoencoderKL"),
    ("diffusers", "UNet2DConditionModel"),
    ("transformers", "CLIPTextModel"),
    ("transformers", "CLIPTokenizer"),
)
"""Classes whose modules are imported when they are first asked for."""


def prepare(env: Mapping[str, str]) -> None:
    """Quiet the libraries' own bars, and keep the hub's files in the shared cache. Before any of them is imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    if environment.CACHE_DIR in env:
        os.environ.setdefault("HF_HOME", os.path.join(env[environment.CACHE_DIR], "hub"))  # noqa: PTH118


def preload() -> None:
    """Import what a rank will want.

    Raises:
        ImportError: this installation cannot train.
    """
    for module in HEAVY:
        importlib.import_module(module)
    for module, name in LAZY:
        getattr(importlib.import_module(module), name)
