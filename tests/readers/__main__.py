"""Writes the outputs of every method and family, and reads them with the oldest and the newest releases.

`make test-readers`. The newest releases are those of this environment.

Usage: python -m tests.readers --oldest PYTHON [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
NUM_LINES = 40
"""Number of lines of stderr that are printed if a program fails."""


def main() -> int:
    """Run the writer and, next to each other, the readers; return 0 if each output is read by all of them."""
    parser = argparse.ArgumentParser(prog="python -m tests.readers", description=main.__doc__)
    parser.add_argument("--oldest", type=Path, required=True, help="interpreter of the environment of oldest releases")
    parser.add_argument("--folder", type=Path, help="folder for the outputs, which are kept; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="readers-") as temporary:
        folder = str((options.folder or Path(temporary) / "outputs").absolute())
        if _finish("writer", *_start(sys.executable, "tests.readers.write", folder)):
            return 1
        # An absolute path that is not resolved: a link to the interpreter finds its environment by the path.
        interpreters = {"oldest": str(options.oldest.absolute()), "newest": sys.executable}
        readers = {name: _start(python, "tests.readers.read", folder) for name, python in interpreters.items()}
        return max([_finish(name, *reader) for name, reader in readers.items()])


def _start(python: str, module: str, folder: str) -> tuple[subprocess.Popen[str], IO[str]]:
    """Start a program; return it and the file with its stderr, where the libraries print progress and notes."""
    # One thread each: the tensors are tiny. Nothing may come from the hub.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    notes = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  closed by _finish
    command = [python, "-m", module, folder]
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=notes), notes


def _finish(name: str, process: subprocess.Popen[str], notes: IO[str]) -> int:
    output, _ = process.communicate()
    print(f"{name}: {output.strip()}", flush=True)
    with notes:
        notes.seek(0)
        if process.returncode != 0:
            print("".join(notes.readlines()[-NUM_LINES:]), file=sys.stderr, flush=True)
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
