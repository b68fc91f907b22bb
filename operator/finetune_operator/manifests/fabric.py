"""Communication of the ranks: torch's backend for a topology, and the environment of its library."""

from __future__ import annotations

from finetune_operator.api.job import Accelerator, TopologySpec
from finetune_operator.manifests.resources import uses_efa, uses_huge_pages

NCCL = "nccl"


def backend(topology: TopologySpec) -> str:
    """Return the torch.distributed backend: nccl on GPUs, topology.cpu.backend on CPUs."""
    return NCCL if topology.accelerator is Accelerator.GPU else topology.cpu.backend.value


def fabric_env(topology: TopologySpec) -> dict[str, str]:
    """Return the environment of NCCL. That of gloo and oneCCL depends on the node: the supervisor sets it."""
    if topology.accelerator is Accelerator.GPU:
        return {
            # Warnings name the peer and the interface; by default NCCL logs nothing.
            "NCCL_DEBUG": "WARN",
            # Torch's watchdog would kill the process when a peer is lost, and its monitor when a thread is slow, before
            # a surviving rank has saved. Instead the supervisor ends the ranks, and recovery.hangTimeout detects hangs.
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
            "TORCH_NCCL_ENABLE_MONITORING": "0",
            **(_efa_env(topology) if uses_efa(topology) else {}),
        }
    return {}


def _efa_env(topology: TopologySpec) -> dict[str, str]:
    """Return the environment of NCCL over Elastic Fabric Adapters.

    aws-ofi-nccl chooses everything else by the type of the machine. FI_EFA_USE_DEVICE_RDMA is left out: libfabric uses
    RDMA wherever the adapter supports it, and the variable would abort the ranks on other machines.
    """
    return {
        # Never libfabric's TCP provider, which is slower than NCCL's own sockets.
        "FI_PROVIDER": "efa",
        # The ranks find each other over the pod network.
        "NCCL_SOCKET_IFNAME": "^docker,lo",
        # libfabric's buffers are in huge pages by default. Without any, data loaders cannot be forked.
        **({} if uses_huge_pages(topology) else {"FI_EFA_USE_HUGE_PAGE": "0"}),
    }
