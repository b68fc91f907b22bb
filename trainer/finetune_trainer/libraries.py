"""The large libraries of the trainer: their settings, which they read during import, and their import."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping

from finetune_contract import environment
from finetune_trainer import deferred_packages

HEAVY = (
    "finetune_trainer.train.run",
    "accelerate",
    "diffusers.models",
    "diffusers.optimization",
    "peft.utils",
)
"""Modules that every rank imports; each takes seconds."""
LAZY = (
    ("diffusers", "AutoencoderKL"),
    ("diffusers", "UNet2DConditionModel"),
    ("transformers", "CLIPTextModel"),
    ("transformers", "CLIPTokenizer"),
)
"""Classes whose modules are imported at the first access."""


def prepare(env: Mapping[str, str]) -> None:
    """Disable the libraries' progress bars, and store hub files in the shared cache. Call it before their import.

    Packages that a run needs for one module only are deferred.
    """
    deferred_packages.defer()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    if environment.CACHE_DIR in env:
        os.environ.setdefault("HF_HOME", os.path.join(env[environment.CACHE_DIR], "hub"))  # noqa: PTH118


def preload(imported: Callable[[str], None] = lambda _: None) -> None:
    """Import the libraries that a rank needs.

    Args:
        imported: called with the name of each module after its import.

    Raises:
        ImportError: a library of the trainer is not installed.
    """
    for module in HEAVY:
        importlib.import_module(module)
        imported(module)
    for module, name in LAZY:
        getattr(importlib.import_module(module), name)
        imported(f"{module}.{name}")
