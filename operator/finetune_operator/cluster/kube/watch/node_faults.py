"""Taints and conditions by which health tools report a faulty node: a table, and the signs of one node. Pure.

A taint, or a condition of a cordoned node, means that the node will be drained: its ranks save and move. A condition
alone is evidence only. It explains a failure of a rank there, but pods that work may stay.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

NVSENTINEL = "NVSentinel"
DETECTOR = "node-problem-detector"
AKS = "AKS"
EKS = "EKS node monitoring agent"
_STRICT = frozenset({"NoSchedule", "NoExecute"})
"""Effects of taints that report a fault. PreferNoSchedule reports a degraded node, which still works."""


@dataclass(frozen=True)
class FaultSign:
    """One row of the tables.

    Attributes:
        source: the tool that sets it.
        of_gpu: whether a GPU or a link between GPUs is at fault; otherwise the node itself.
        status: the value of a condition that means a fault.
    """

    source: str
    of_gpu: bool = True
    status: str = "True"


TAINTS = {
    **dict.fromkeys(
        (
            *("nvidia.com/gpu-error", "nvidia.com/gpu-xid-error", "nvidia.com/gpu-nvlink-error"),
            *("nvidia.com/syslog-xid-error", "nvidia.com/gpu-fatal-error"),
        ),
        FaultSign(NVSENTINEL),
    ),
    "node.kubernetes.io/kernel-deadlock": FaultSign(DETECTOR, of_gpu=False),
    "node.kubernetes.io/readonly-filesystem": FaultSign(DETECTOR, of_gpu=False),
}
"""Taints by key. `nvidia.com/gpu` itself only keeps other pods away from GPU nodes."""
TAINT_PREFIXES = {
    "gpu.health/": FaultSign(NVSENTINEL),
    "nvlink.health/": FaultSign(NVSENTINEL),
    "nvswitch.health/": FaultSign(NVSENTINEL),
}
"""Taints by the start of their key."""
CONDITIONS = {
    **dict.fromkeys(
        (
            *("GpuMemWatch", "GpuPcieWatch", "GpuInforomWatch", "GpuSmWatch", "GpuNvlinkWatch", "GpuMcuWatch"),
            *("GpuPmuWatch", "GpuDriverWatch", "GpuPowerWatch", "GpuThermalWatch", "SysLogsXIDError"),
            *("SysLogsSXIDError", "SysLogsGPUFallenOff", "NVSwitchFatalError", "NVSwitchDown"),
        ),
        FaultSign(NVSENTINEL),
    ),
    **dict.fromkeys(("GPUMissing", "NVLinkStatusInactive", "XIDErrors"), FaultSign(AKS)),
    "FilesystemCorruptionProblem": FaultSign(AKS, of_gpu=False),
    "KernelDeadlock": FaultSign(DETECTOR, of_gpu=False),
    "ReadonlyFilesystem": FaultSign(DETECTOR, of_gpu=False),
    "AcceleratedHardwareReady": FaultSign(EKS, status="False"),
    "KernelReady": FaultSign(EKS, of_gpu=False, status="False"),
    "StorageReady": FaultSign(EKS, of_gpu=False, status="False"),
}
"""Conditions by type."""


@dataclass(frozen=True)
class NodeFault:
    """What the signs of one node say.

    Attributes:
        name: key of the taint or type of the condition; empty: no sign.
        gpu: description of a fault of a GPU; empty: none.
        leaves: whether the node will be drained because of it.
    """

    name: str = ""
    gpu: str = ""
    leaves: bool = False


def find_fault(taints: Iterable[Any], conditions: Iterable[Any], is_cordoned: bool) -> NodeFault:
    """Return the first sign of a fault: taints come before conditions, and GPUs before the node itself.

    Args:
        taints: taints of the node in their API form.
        conditions: its conditions in their API form.
        is_cordoned: whether new pods are kept away from it.
    """
    signs = [
        *((taint["key"], _sign_of(taint["key"]), True) for taint in taints if taint.get("effect") in _STRICT),
        *(
            (each["type"], sign, is_cordoned)
            for each in conditions
            if (sign := CONDITIONS.get(each["type"])) is not None and each["status"] == sign.status
        ),
    ]
    found = [(name, sign, leaves) for name, sign, leaves in signs if sign is not None]
    if not found:
        return NodeFault()
    name, sign, leaves = min(found, key=lambda each: (not each[1].of_gpu, not each[2]))
    return NodeFault(name, f"{name}, reported by {sign.source}" if sign.of_gpu else "", leaves)


def _sign_of(key: str) -> FaultSign | None:
    return TAINTS.get(key) or next((sign for start, sign in TAINT_PREFIXES.items() if key.startswith(start)), None)
