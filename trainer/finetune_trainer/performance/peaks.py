"""Peak performance of GPUs by their name and the number format. Pure.

The figures are those of the vendors' data sheets, dense (without structured sparsity), in TFLOP/s: tensor cores with
fp32 accumulation for bf16, fp16 and TF32, and the vector units for fp32. A name has to match completely, because parts
of a GPU (MIG) and variants with other clocks have other peaks. No figure is better than a wrong one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from finetune_contract.spec import Precision

TERA = 1e12


@dataclass(frozen=True)
class PeakTeraflops:
    """Peaks of one device in TFLOP/s; None if it has no such units.

    Attributes:
        fp32: plain fp32.
        tf32: fp32 that torch may round to TF32.
        half: fp16, and bf16 unless `has_bf16` is False.
        has_bf16: whether there are bf16 units.
    """

    fp32: float
    tf32: float | None
    half: float
    has_bf16: bool = True


_H100_SXM = PeakTeraflops(66.9, 494.7, 989.4)
_A100 = PeakTeraflops(19.5, 156.0, 312.0)

_TABLE: tuple[tuple[str, PeakTeraflops], ...] = (
    # NVIDIA H100 and H200 Tensor Core GPU data sheets; the GH200 has the same GPU.
    (r"NVIDIA H100 (SXM5 )?80GB HBM[23]e?", _H100_SXM),
    (r"NVIDIA H100 PCIe", PeakTeraflops(51.2, 378.0, 756.0)),
    (r"NVIDIA H100 NVL", PeakTeraflops(60.0, 417.5, 835.0)),
    (r"NVIDIA H200", _H100_SXM),
    (r"NVIDIA H200 NVL", PeakTeraflops(60.0, 417.5, 835.0)),
    (r"NVIDIA GH200 (480GB|144G HBM3e|120GB)", _H100_SXM),
    # NVIDIA HGX B200 data sheet, one of eight GPUs.
    (r"NVIDIA B200", PeakTeraflops(75.0, 1125.0, 2250.0)),
    # NVIDIA A100 Tensor Core GPU data sheet: the same for SXM and PCIe.
    (r"(NVIDIA )?A100-(SXM4|PCIE)-(40|80)GB", _A100),
    (r"NVIDIA A100 80GB PCIe", _A100),
    # NVIDIA A10G data sheet for AWS; NVIDIA A10 data sheet.
    (r"NVIDIA A10G", PeakTeraflops(31.5, 35.0, 70.0)),
    (r"NVIDIA A10", PeakTeraflops(31.2, 62.5, 125.0)),
    # NVIDIA L4 and L40S data sheets.
    (r"NVIDIA L4", PeakTeraflops(30.3, 60.0, 121.0)),
    (r"NVIDIA L40S", PeakTeraflops(91.6, 183.0, 362.0)),
    # NVIDIA T4 and V100 data sheets.
    (r"(Tesla|NVIDIA) T4", PeakTeraflops(8.1, None, 65.0, has_bf16=False)),
    (r"(Tesla|NVIDIA) V100-SXM[23]-(16|32)GB(-LS)?", PeakTeraflops(15.7, None, 125.0, has_bf16=False)),
    (r"(Tesla|NVIDIA) V100-PCIE-(16|32)GB", PeakTeraflops(14.0, None, 112.0, has_bf16=False)),
    # NVIDIA's architecture white papers on GA102, Ada and Blackwell (RTX).
    (r"NVIDIA GeForce RTX 3090", PeakTeraflops(35.6, 35.6, 71.0)),
    (r"NVIDIA GeForce RTX 4090", PeakTeraflops(82.6, 82.6, 165.2)),
    (r"NVIDIA GeForce RTX 5090", PeakTeraflops(104.8, 104.8, 209.5)),
    # AMD Instinct MI300X data sheet.
    (r"AMD Instinct MI300X( VF| OAM)?", PeakTeraflops(163.4, 653.7, 1307.4)),
)
"""Complete names as torch reports them (regular expressions), and the peaks."""


def peak_flops(device: str, precision: Precision, allows_tf32: bool) -> float | None:
    """Return the peak of a device in FLOP/s for matrix products in a format.

    Args:
        device: name that torch reports.
        precision: format of the forward and the backward pass.
        allows_tf32: whether torch may round fp32 to TF32 in matrix products.

    Returns:
        None for an unknown device, or a format without units of its own.
    """
    found = next((peak for pattern, peak in _TABLE if re.fullmatch(pattern, device)), None)
    if found is None:
        return None
    if precision is Precision.FP32:
        return TERA * (found.tf32 if allows_tf32 and found.tf32 is not None else found.fp32)
    if precision is Precision.BF16 and not found.has_bf16:
        return None
    return TERA * found.half
