"""Filter a lock on its way to the CPU image: without torch and what only its CUDA build needs.

Called as without_cuda.py INDEX < lock > filtered. Without an index nothing is left out: then torch is the locked one.
"""

from __future__ import annotations

import re
import sys

CUDA_ONLY = re.compile(r"^(torch|triton|nvidia-[\w-]+|cuda-[\w-]+)==")


def main(index: str) -> None:
    """Copy the entries that are wanted; an entry goes on over its indented lines of hashes."""
    wanted = True
    for line in sys.stdin:
        if not line.startswith((" ", "\t")):
            wanted = not (index and CUDA_ONLY.match(line))
        if wanted:
            sys.stdout.write(line)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
