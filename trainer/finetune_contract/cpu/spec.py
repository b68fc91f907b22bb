"""Settings of CPU training (`topology.cpu`): communication, IPEX, placement and allocator."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from finetune_contract.spec import Switch, SwitchMode
from finetune_contract.spec_model import SpecModel

MAX_CORES_FOR_COMMUNICATION = 64


class CpuBackend(StrEnum):
    """Communication libraries of CPU ranks."""

    AUTO = "auto"
    """oneCCL where the image contains its binding, otherwise gloo."""
    GLOO = "gloo"
    CCL = "ccl"


class RanksPer(StrEnum):
    """Part of the machine that a rank keeps to: its cores, and the memory next to them."""

    SOCKET = "socket"
    NUMA = "numa"
    NODE = "node"
    """The whole machine: the cores are divided without regard to sockets and NUMA nodes, and memory is not bound."""


class Allocator(StrEnum):
    """Memory allocators of the ranks."""

    AUTO = "auto"
    """tcmalloc or jemalloc where the image contains it, otherwise glibc."""
    GLIBC = "glibc"
    TCMALLOC = "tcmalloc"
    JEMALLOC = "jemalloc"


class CpuSpec(SpecModel):
    """Settings of CPU training."""

    backend: CpuBackend = Field(
        default=CpuBackend.AUTO,
        description="Communication library: gloo (built into torch), ccl (oneCCL, in the image trainer-cpu-intel), or "
        "auto: ccl where the image has it, otherwise gloo",
    )
    ipex: Switch = Field(
        default=SwitchMode.AUTO,
        description="Intel Extension for PyTorch, in the image trainer-cpu-intel: on, off, or auto: where the image "
        "has it and it is faster on this processor",
    )
    ranks_per: RanksPer = Field(
        default=RanksPer.NUMA,
        description="Part of the machine whose cores and memory a rank keeps to: numa (NUMA node), socket, or node "
        "(the whole machine). processesPerNode sets the number of ranks; one per NUMA node is fastest",
    )
    cores_for_communication: int | None = Field(
        default=None,
        ge=0,
        le=MAX_CORES_FOR_COMMUNICATION,
        description="Cores of each rank that only exchange gradients; default: 1 with ccl if the rank has at least 4 "
        "cores, otherwise 0",
    )
    allocator: Allocator = Field(
        default=Allocator.AUTO,
        description="Memory allocator: glibc, tcmalloc, jemalloc, or auto: tcmalloc or jemalloc where the image has "
        "it, otherwise glibc",
    )
