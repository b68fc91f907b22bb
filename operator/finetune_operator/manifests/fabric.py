"""How ranks talk to each other: torch's backend for a topology, and the environment that its library wants."""

from __future__ import annotations

from finetune_operator.api.job import Accelerator, CpuBackend, TopologySpec

NCCL = "nccl"


def backend(topology: TopologySpec) -> str:
    """The torch.distributed backend: nccl on GPUs, on CPUs what the job asks for."""
    return NCCL if topology.accelerator is Accelerator.GPU else topology.cpu.backend.value


def fabric_env(topology: TopologySpec) -> dict[str, str]:
    """Environment of the communication library. Gloo wants none."""
    if topology.accelerator is Accelerator.GPU:
        return {
            # A warning names the peer and the interface; NCCL's default says nothing at all.
            "NCCL_DEBUG": "WARN",
            # Torch's watchdog would end the process when a peer is gone, and its monitor when a thread is slow, before
            # a survivor has saved. The ranks end by the supervisor's word, and hangs are recovery.hangTimeout's.
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
            "TORCH_NCCL_ENABLE_MONITORING": "0",
        }
    if topology.cpu.backend is CpuBackend.CCL:
        return {
            # The supervisor starts the ranks, not mpirun; it adds each one's CCL_LOCAL_RANK and its worker's core.
            "CCL_PROCESS_LAUNCHER": "none",
            "CCL_LOCAL_SIZE": str(topology.processes_per_node),
            "CCL_ATL_TRANSPORT": "ofi",
            "FI_PROVIDER": "tcp",
            "CCL_WORKER_COUNT": "1",
        }
    return {}
