"""Packages that settings of CPU training need; `validate --here`, `finetune run` and the supervisor check them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from finetune_contract.cpu.backend import INTEL_IMAGE, choose_backend
from finetune_contract.cpu.libraries import MissingAllocatorError, choose_preload
from finetune_contract.cpu.spec import CpuSpec
from finetune_contract.requirements import has_package
from finetune_contract.spec import SwitchMode

IPEX = "intel_extension_for_pytorch"
NO_IPEX = (
    f"topology.cpu.ipex: on needs the package {IPEX}, which is not installed here; use the image {INTEL_IMAGE}, or "
    "write ipex: auto"
)


def find_missing_cpu_software(cpu: CpuSpec, has: Callable[[str], bool] = has_package) -> Iterator[str]:
    """Yield a message, with the field at its start, for each package or library that this machine lacks.

    Args:
        cpu: the settings.
        has: returns whether a package is installed.
    """
    try:
        choose_backend(cpu.backend, has)
    except ValueError as error:
        yield str(error)
    if cpu.ipex is SwitchMode.ON and not has(IPEX):
        yield NO_IPEX
    try:
        choose_preload(cpu.allocator)
    except MissingAllocatorError as error:
        yield str(error)
