"""Resource requests and limits of a pod, and the size of its shared memory."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from finetune_operator.api.job import Accelerator, FineTuneJob, TopologySpec
from finetune_operator.api.quantity import parse_quantity

GPU_RESOURCE = "nvidia.com/gpu"
GPU_CLAIM = "gpus"
"""Name of a pod's claim for its GPUs."""
EFA_RESOURCE = "vpc.amazonaws.com/efa"
"""Elastic Fabric Adapters of AWS; its device plugin has this name."""
HUGE_PAGES = "hugepages-"
"""Start of the names of resources that are huge pages."""
MEMORY = "memory"
MEBIBYTE = 2**20
SHARED_MEMORY_PER_RANK_BYTES = 4 * 2**30
"""Limit of /dev/shm for each rank if the pod has no memory limit: enough for data loaders and NCCL's buffers."""


def build_resources(topology: TopologySpec, cores_per_rank: int) -> dict[str, Any]:
    """Return requests and limits. They are equal, so that no pod of a gang is slowed down by others on its node.

    Cores requested by default are not a limit: a rank may use idle cores.
    """
    amounts = {name: str(amount) for name, amount in (topology.resources or {}).items()}
    by_claim = topology.gpu_claim_template_name is not None
    if topology.accelerator is Accelerator.GPU and not by_claim:
        amounts.setdefault(GPU_RESOURCE, str(topology.processes_per_node))
    requests = dict(amounts)
    if cores_per_rank:
        requests.setdefault("cpu", str(cores_per_rank * topology.processes_per_node))
    resources = {"requests": requests, "limits": amounts, "claims": [{"name": GPU_CLAIM}] if by_claim else []}
    return {name: value for name, value in resources.items() if value}


def grown_topology(job: FineTuneJob) -> TopologySpec:
    """Return the topology of a job with the memory to which its pods have grown.

    An edit of `topology.resources` or `recovery.maxMemory` counts more than what an earlier end has raised.
    """
    topology, raised, most = job.spec.topology, job.status.memory, job.spec.recovery.max_memory
    memory = (topology.resources or {}).get(MEMORY)
    if memory is None or raised is None or most is None:
        return topology
    amounts = [str(memory), min(raised, most, key=parse_quantity)]
    resources = {**(topology.resources or {}), MEMORY: max(amounts, key=parse_quantity)}
    return topology.model_copy(update={"resources": resources})


def build_claims(topology: TopologySpec) -> list[dict[str, Any]]:
    """Return the resource claims of a pod."""
    name = topology.gpu_claim_template_name
    return [{"name": GPU_CLAIM, "resourceClaimTemplateName": name}] if name is not None else []


def uses_efa(topology: TopologySpec) -> bool:
    """Return whether the pods request Elastic Fabric Adapters."""
    return parse_quantity(str((topology.resources or {}).get(EFA_RESOURCE, 0))) > 0


def uses_huge_pages(topology: TopologySpec) -> bool:
    """Return whether the pods request huge pages."""
    return any(name.startswith(HUGE_PAGES) for name in topology.resources or {})


def shared_memory_size(topology: TopologySpec) -> str:
    """Return the size limit of /dev/shm as a quantity.

    It counts towards the memory limit of the pod, so half of the limit is left for the program, as is usual on Linux.
    """
    memory = (topology.resources or {}).get(MEMORY)
    if memory is None:
        num_bytes = Decimal(SHARED_MEMORY_PER_RANK_BYTES * topology.processes_per_node)
    else:
        num_bytes = parse_quantity(str(memory)) / 2
    return f"{max(1, int(num_bytes // MEBIBYTE))}Mi"
