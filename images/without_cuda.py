"""Filter a lock file for the CPU image: remove torch and the packages that only its CUDA build needs.

Called as without_cuda.py INDEX < lock > filtered. INDEX is the index of the CPU-only torch. If it is empty, nothing is
removed, and the image contains the locked torch.
"""

from __future__ import annotations

import re
import sys

CUDA_ONLY = re.compile(r"^(torch|triton|nvidia-[\w-]+|cuda-[\w-]+)==")


def main(index: str) -> None:
    """Copy the other entries. The indented lines after an entry are its hashes."""
    wanted = True
    for line in sys.stdin:
        if not line.startswith((" ", "\t")):
            wanted = not (index and CUDA_ONLY.match(line))
        if wanted:
            sys.stdout.write(line)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
