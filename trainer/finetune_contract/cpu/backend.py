"""The choice of the communication library of CPU ranks. All ranks of a job decide alike: they run the same image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from finetune_contract.cpu.spec import CpuBackend
from finetune_contract.requirements import has_package

CCL_BINDING = "oneccl_bindings_for_pytorch"
"""Package that registers oneCCL as a backend of torch.distributed."""
INTEL_IMAGE = "trainer-cpu-intel"
NO_BINDING = (
    f"topology.cpu.backend: ccl needs the package {CCL_BINDING}, which is not installed here; use the image "
    f"{INTEL_IMAGE}, or write backend: gloo"
)


@dataclass(frozen=True)
class BackendChoice:
    """A backend of torch.distributed, and why it was chosen."""

    backend: str
    reason: str


def choose_backend(requested: str, has: Callable[[str], bool] = has_package) -> BackendChoice:
    """Return the backend of the ranks of this image: the requested one, or that of `auto`.

    Args:
        requested: auto, gloo, ccl or nccl.
        has: returns whether a package is installed.

    Raises:
        ValueError: the requested backend is not installed. The message names the field and the remedy.
    """
    if requested == CpuBackend.CCL and not has(CCL_BINDING):
        raise ValueError(NO_BINDING)
    if requested != CpuBackend.AUTO:
        return BackendChoice(requested, "the job requests it")
    if has(CCL_BINDING):
        return BackendChoice(CpuBackend.CCL.value, f"auto, and the package {CCL_BINDING} is installed")
    return BackendChoice(CpuBackend.GLOO.value, f"auto, and the package {CCL_BINDING} is not installed")
