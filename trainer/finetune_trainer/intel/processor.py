"""What this machine's processor supports, from the flags that Linux reports. Called by `train` and `performance`."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
_AMX_FLAGS = {"amx_tile", "amx_bf16"}


@dataclass(frozen=True)
class Processor:
    """A processor.

    Attributes:
        name: name of the model, e.g. "Intel(R) Xeon(R) Platinum 8480+"; empty if Linux reports none.
        has_amx: whether it has tiles with bf16 products (AMX).
        has_avx512_bf16: whether it has bf16 products of vectors.
        has_avx512: whether it has vectors of 512 bits.
    """

    name: str = ""
    has_amx: bool = False
    has_avx512_bf16: bool = False
    has_avx512: bool = False

    @property
    def has_bf16(self) -> bool:
        """Whether it has bf16 instructions; without them bf16 is slower than fp32."""
        return self.has_amx or self.has_avx512_bf16

    @property
    def instructions(self) -> str:
        """The instructions that decide the speed of matrix products, for the log."""
        if self.has_amx:
            return "AMX (bf16 tiles)"
        if self.has_avx512_bf16:
            return "AVX-512 BF16"
        return "AVX-512 (fp32)" if self.has_avx512 else "no bf16 instructions (fp32)"


def parse_processor(cpu_info: str) -> Processor:
    """Return the first processor of a text in the format of /proc/cpuinfo."""
    values: dict[str, str] = {}
    for line in cpu_info.splitlines():
        key, separator, value = line.partition(":")
        if separator:
            values.setdefault(key.strip(), value.strip())
    flags = set(values.get("flags", "").split())
    return Processor(
        name=values.get("model name", ""),
        has_amx=flags >= _AMX_FLAGS,
        has_avx512_bf16="avx512_bf16" in flags,
        has_avx512="avx512f" in flags,
    )


@functools.cache
def this_processor() -> Processor:
    """Return the processor of this machine; without /proc/cpuinfo, one without special instructions."""
    try:
        return parse_processor(CPU_INFO.read_text(encoding="utf-8"))
    except OSError:
        return Processor()
