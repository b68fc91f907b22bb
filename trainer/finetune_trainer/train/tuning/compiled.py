"""Decides whether blocks are compiled, and keeps the compiled code on the shared storage.

Compiled code depends on the release of torch and on the device, not on the job: all jobs share it. torch writes each
file under another name first and locks what it compiles, so that several ranks and machines can use one folder.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune_contract.methods import TrainedPart
from finetune_contract.requirements import has_compiler
from finetune_contract.spec import Sharding, SwitchMode, TrainingSpec
from finetune_trainer.methods.registry import method_traits

FOLDER = "compiled"
"""Folder in the cache with the compiled code."""
INDUCTOR, TRITON = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"
_COMPILE_SECONDS = 40.0
"""Time to compile the blocks of one shape, with an empty cache: 20 s of SDXL on an H100 with a slow host, doubled."""
_CACHED_SECONDS = 8.0
"""Time to load the compiled code of one shape."""
_SAVED_SECONDS = 0.03
"""Time that a pass with compiled blocks saves at least: 10 % of a pass of SDXL at 1024 px, batch 4."""


@dataclass(frozen=True)
class CompileFacts:
    """What the choice depends on besides the manifest.

    Attributes:
        is_gpu: whether the ranks compute on GPUs.
        has_compiler: whether a C++ compiler is installed on all ranks.
        num_passes: passes of a rank that the run has left.
        num_shapes: number of shapes of the images.
        is_cached: whether an earlier run has compiled for this device.
    """

    is_gpu: bool
    has_compiler: bool
    num_passes: int
    num_shapes: int = 1
    is_cached: bool = False


def choose_compile(training: TrainingSpec, facts: CompileFacts) -> tuple[bool, str]:
    """Return whether to compile, and the reason for `auto`."""
    if training.compile is not SwitchMode.AUTO:
        return training.compile is SwitchMode.ON, ""
    obstacle = _find_obstacle(training, facts)
    return (True, "compile is on") if obstacle is None else (False, f"compile is off because {obstacle}")


def _find_obstacle(training: TrainingSpec, facts: CompileFacts) -> str | None:
    if not facts.is_gpu:
        return "the ranks compute on CPUs"
    if not facts.has_compiler:
        return "no C++ compiler is installed"
    if method_traits(training.method).trains is TrainedPart.ADAPTER:
        return "the adapters of several layers are computed together"
    if training.sharding is not Sharding.NONE:
        return "weights are sharded"
    needed = (_CACHED_SECONDS if facts.is_cached else _COMPILE_SECONDS) * facts.num_shapes
    saved = _SAVED_SECONDS * facts.num_passes * (training.resolution / 1024) ** 2
    if saved < 2 * needed:
        return f"the remaining {facts.num_passes} passes save less time than it takes"
    return None


def cache_key(device: torch.device) -> str:
    """Return the name of the folder for compiled code: it depends on torch, on Python and on the device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    text = f"torch{torch.__version__}-python{platform.python_version()}-{name}"
    return re.sub(r"[^A-Za-z0-9.+-]", "_", text)[:120]


def _cpu_name() -> str:
    """Return a name of the instructions of this CPU, for which torch compiles."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:12]}"


def use_compile_cache(cache_dir: Path, device: torch.device, env: MutableMapping[str, str] = os.environ) -> Path:
    """Let torch store compiled code in the cache, and return the folder; one that the environment names is kept."""
    folder = cache_folder(cache_dir, device)
    # torch writes its own default into the environment when some of its modules are imported.
    usual = _torch_default()
    for name, own in ((INDUCTOR, folder / "inductor"), (TRITON, folder / "triton")):
        if not env.get(name) or Path(env[name]).is_relative_to(usual):
            env[name] = str(own)
    return Path(env[INDUCTOR])


def _torch_default() -> Path:
    """Return the folder in which torch stores compiled code by default: on the disk of the pod."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # noqa: PLC0415  slow to import

    return Path(default_cache_dir())


def cache_folder(cache_dir: Path, device: torch.device) -> Path:
    """Return the folder for code that was compiled for a device."""
    return cache_dir / FOLDER / cache_key(device)


def is_cached(folder: Path) -> bool:
    """Return whether an earlier run has stored compiled code in a folder of `cache_folder`."""
    return (folder / "inductor" / "fxgraph").is_dir()


def tolerate_failures() -> None:
    """Let blocks that cannot be compiled run without the compiler; torch logs why."""
    torch._dynamo.config.suppress_errors = True


def can_compile() -> bool:
    """Return whether this machine has what torch needs to compile."""
    return has_compiler()
