"""Checks that the modules below some folders are compiled: a process with a read-only root cannot keep bytecode.

Without it, each start compiles hundreds of modules again. Usage: python check_bytecode.py FOLDER...
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

LEFT_OUT = frozenset({"test", "tests", "idlelib", "lib2to3", "tkinter", "turtledemo", "ensurepip", "templates"})
"""Folders that no start imports. Some of their files are not valid Python."""
MIN_SHARE = 0.99
"""Packages contain a few files that only another version of Python can compile."""


def uncompiled(folder: Path) -> tuple[list[Path], int]:
    """Return the modules below a folder without bytecode, and the number of all modules."""
    modules = [path for path in sorted(folder.rglob("*.py")) if not LEFT_OUT.intersection(path.parts)]
    missing = [path for path in modules if not Path(importlib.util.cache_from_source(path)).is_file()]
    return missing, len(modules)


def main(folders: list[str]) -> int:
    """Check the folders, print what is missing, and return the exit code."""
    code = 0
    for folder in folders:
        missing, count = uncompiled(Path(folder))
        print(f"{folder}: {count - len(missing)} of {count} modules are compiled")
        if count - len(missing) < MIN_SHARE * count or count == 0:
            print("\n".join(f"  not compiled: {path}" for path in missing[:20]), file=sys.stderr)
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
