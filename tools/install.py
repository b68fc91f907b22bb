"""Create a virtual environment from lock files, and print progress: the one of every make target, or that of a reader.

Called by the Makefile. Uses only the standard library. The environment is stamped with a hash of everything that
determines its content: a second call returns at once, and an interrupted installation starts over.

Usage: python3 tools/install.py ENVIRONMENT [LOCK]

Without LOCK: requirements/dev.txt, and this project. With LOCK: only what this lock file lists.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BOOTSTRAP, PROJECT_LOCK, PROJECT = "requirements/bootstrap.txt", "requirements/dev.txt", "pyproject.toml"
TICK_SECONDS = 3.0


def stamp(inputs: tuple[str, ...]) -> str:
    """Return a hash of the interpreter and of the files that determine what is installed."""
    digest = hashlib.sha256(sys.version.encode())
    for name in inputs:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def size_mib(folder: Path) -> int:
    """Return the size of the files in a folder in MiB; 0 if the folder does not exist."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size  # noqa: PTH118
            except OSError:
                continue
    return total >> 20


def run(title: str, command: list[str], watched: Path, env: dict[str, str]) -> None:
    """Run one step and print progress every few seconds. Print the output of the step only if it fails."""
    started = time.monotonic()
    done = threading.Event()

    def report() -> None:
        while not done.wait(TICK_SECONDS):
            seconds = time.monotonic() - started
            print(f"  {title}: {seconds:4.0f} s, {size_mib(watched):5d} MiB on disk", flush=True)

    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    try:
        result = subprocess.run(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
    finally:
        done.set()
        reporter.join()
    if result.returncode != 0:
        sys.exit(f"{result.stdout}\n{title} failed; the command was: {' '.join(command)}")
    print(f"  {title}: done in {time.monotonic() - started:.1f} s", flush=True)


def main(target: Path, lock: str = PROJECT_LOCK) -> None:
    """Install what a lock file lists into the folder `target`; with the lock file of the project, also the project."""
    if sys.version_info < (3, 11):  # noqa: UP036
        sys.exit(f"Python 3.11 or newer is required; this is {sys.version.split()[0]}. Set PYTHON=/path/to/python3.11")
    has_project = lock == PROJECT_LOCK
    current = stamp((BOOTSTRAP, lock, *([PROJECT] if has_project else [])))
    mark = target / ".installed"
    if mark.is_file() and mark.read_text() == current:
        return
    started = time.monotonic()
    print(f"Installing into {target.name}, once (about 6 GB, most of it torch):", flush=True)
    if target.exists():
        shutil.rmtree(target)
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "UV_NO_PROGRESS": "1", "UV_LINK_MODE": "hardlink"}
    env.pop("VIRTUAL_ENV", None)
    python = str(target / "bin" / "python")
    run("environment", [sys.executable, "-m", "venv", str(target)], target, env)
    pip = [python, "-m", "pip", "install", "--quiet", "--require-hashes"]
    run("installer", [*pip, "-r", str(ROOT / BOOTSTRAP)], target, env)
    uv = [str(target / "bin" / "uv"), "pip", "install", "--python", python]
    run("dependencies", [*uv, "--require-hashes", "-r", str(ROOT / lock)], target, env)
    if has_project:
        run("this project", [*uv, "--no-deps", "--no-build-isolation", "-e", str(ROOT)], target, env)
    mark.write_text(current)
    print(f"Installed in {time.monotonic() - started:.0f} s.", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), *sys.argv[2:3])
