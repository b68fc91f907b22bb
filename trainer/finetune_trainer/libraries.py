"""The large libraries of the trainer: their settings, which they read during import, and their import."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

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


IPEX = "intel_extension_for_pytorch"
"""Changes operations of torch in the whole process, and takes longer to import than all others."""
PATH_FILE = "processor.json"
"""File in the job's folder: how the first attempt computed on CPUs, e.g. "bf16 with IPEX"."""


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
    if uses_ipex(os.environ) and importlib.util.find_spec(IPEX) is not None:
        # A rank reports why it cannot be imported.
        with contextlib.suppress(ImportError, OSError, RuntimeError):
            import_ipex()
            imported(IPEX)


def import_ipex() -> ModuleType:
    """Import IPEX and return it.

    Raises:
        ImportError: it does not fit to torch or to the processor; it may also raise an OSError or a RuntimeError.
    """
    # It imports the compiler of torch, which would start its processes and a thread. Runs with IPEX do not compile.
    os.environ.setdefault("TORCH_WARM_POOL", "0")
    # The tests compare the gradients of all its operations with those of torch.
    warnings.filterwarnings("ignore", message=".*an autograd kernel was not registered", category=UserWarning)
    return importlib.import_module(IPEX)


def uses_ipex(env: Mapping[str, str]) -> bool:
    """Return whether the ranks of this pod will import IPEX: the job requires it, or an earlier attempt chose it."""
    try:
        requested = json.loads(Path(env[environment.RUN_SPEC]).read_text(encoding="utf-8")).get("cpu", {}).get("ipex")
        if requested != "auto":
            return bool(requested == "on")
        return str(json.loads((Path(env[environment.CHECKPOINT_DIR]) / PATH_FILE).read_text())).endswith("with IPEX")
    except (OSError, ValueError, KeyError, AttributeError):
        return False
