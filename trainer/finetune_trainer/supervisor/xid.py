"""Errors of NVIDIA's driver (XID) that mean that a GPU, or a link between GPUs, is faulty. A table; torch-free.

https://docs.nvidia.com/deploy/xid-errors describes all of them. Errors that a program can cause itself (13, 31, 43, 45,
...) are not in the table: they must count as failures of the program.
"""

from __future__ import annotations

FAULTS = {
    48: "an uncorrectable ECC error",
    62: "the power management unit has halted",
    64: "a failure to retire or remap a page of memory",
    74: "an error of NVLink",
    79: "the GPU has fallen off the bus",
    95: "an uncontained ECC error",
    110: "a security fault",
    119: "a timeout of the GPU's system processor (GSP)",
    120: "an error of the GPU's system processor (GSP)",
    136: "a failure of the link training of the GPU",
    140: "an unrecovered ECC error",
    143: "a failure of the GPU's initialization",
    154: "the driver asks for a reset of the GPU or the node",
}
"""Meaning of each error after which the GPU cannot be used before a repair or a reset."""
UNCORRECTABLE = "uncorrectable ECC errors"
"""Meaning of a fault that NVML reports as an event without a number."""


def describe_fault(uuid: str, xid: int | None) -> str:
    """Return a description for users, e.g. 'GPU GPU-1f: XID 79, the GPU has fallen off the bus'."""
    if xid is None:
        return f"GPU {uuid}: {UNCORRECTABLE}"
    return f"GPU {uuid}: XID {xid}, {FAULTS.get(xid, 'an error of the GPU')}"
