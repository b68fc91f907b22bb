"""Rules of CPU training: `topology.cpu`."""

from __future__ import annotations

from finetune_contract.cpu.spec import CpuBackend
from finetune_operator.api.job import Accelerator, TopologySpec
from finetune_operator.api.rules.rule import Rule, Scope

TOPOLOGY = Scope("spec.topology", TopologySpec)

CPU_RULES = (
    Rule(
        TOPOLOGY,
        "cpu.backend",
        "self.accelerator == 'cpu' || self.cpu.backend != 'ccl'",
        lambda topology: topology.accelerator is Accelerator.CPU or topology.cpu.backend is not CpuBackend.CCL,
        "backend ccl is for CPUs, GPUs always use NCCL; write accelerator: cpu, or leave backend out",
    ),
    Rule(
        TOPOLOGY,
        "cpu.coresForCommunication",
        "self.accelerator == 'cpu' || !has(self.cpu.coresForCommunication)",
        lambda topology: topology.accelerator is Accelerator.CPU or topology.cpu.cores_for_communication is None,
        "coresForCommunication is for CPUs, GPUs exchange gradients themselves; write accelerator: cpu, or leave "
        "coresForCommunication out",
    ),
)
