"""Number of operations that one training step dispatches to the device, per method: forward and backward pass.

`python -m bench.launches`. On a GPU each of these operations is at least one kernel launch, which costs the host about
30 us; a step with thousands of small ones leaves the GPU idle. The models have the sizes of SD 1.5 and SDXL and no
data (meta tensors), so the count needs neither a GPU nor memory. Views and allocations are excluded. Without data
torch decomposes attention, so a GPU with a fused kernel launches fewer. Fused operations of this project count as one;
on a GPU each is one Triton kernel, or two for a group norm. CUDA graphs and compiled blocks are not used.

SDXL LoRA: rank 4, 1024 px, batch 4. SD 1.5: 512 px, batch 8. The last line is JSON: operations by case, e.g.
{"sdxl_lora", "sd15_lora", "sd15_full", ...}. Options::

    python -m bench.launches --cases sdxl_lora sd15_lora --top 20
"""

from __future__ import annotations

import argparse
import sys

from bench.train import METHODS
from testing.measure.launches import SD15_LORA, SDXL_LORA, LaunchCase, count_operations
from testing.measure.report import finish

CASES = {
    "sdxl_lora": SDXL_LORA,
    "sd15_lora": SD15_LORA,
    **{
        f"{family}_{name.lower()}": LaunchCase(family, name, resolution, batch, settings)
        for family, resolution, batch in (("sd15", 512, 8), ("sdxl", 1024, 4))
        for name, settings in METHODS.items()
        if name != "LoRA"
    },
}


def main() -> int:
    """Count each case, and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--top", type=int, default=0, help="also print this number of the most frequent operations")
    args = parser.parse_args()
    rows, result = [], {}
    for name in args.cases:
        counts = count_operations(CASES[name])
        result[name] = counts.total()
        case = CASES[name]
        rows.append([name, case.resolution, case.batch, counts.total()])
        print(f"  {name}: {counts.total():,}", flush=True)
        for operation, count in counts.most_common(args.top):
            print(f"    {count:6,} {operation}", flush=True)
    finish(["case", "pixels", "batch", "operations"], rows, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
