"""Make the virtual environment that every target runs in, from the locks, with progress on every terminal.

Called by the Makefile. Uses nothing but the standard library. The environment is stamped with the hash of the locks
and of pyproject.toml, so a second call returns at once, and one that broke halfway starts over.

Usage: python3 tools/install.py ENVIRONMENT
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
INPUTS = ("requirements/bootstrap.txt", "requirements/dev.txt", "pyproject.toml")
TICK_SECONDS = 3.0


def stamp() -> str:
    """Hash of everything that decides what is installed."""
    digest = hashlib.sha256(sys.version.encode())
    for name in INPUTS:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def size_mib(folder: Path) -> int:
    """Size of a folder in MiB by its files' lengths, zero where it does not exist yet."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size  # noqa: PTH118
            except OSError:
                continue
    return total >> 20


def run(title: str, command: list[str], watched: Path, env: dict[str, str]) -> None:
    """Run one step and say every few seconds that it goes on; its own output is shown only where it fails."""
    started = time.monotonic()
    done = threading.Event()

    def tell() -> None:
        while not done.wait(TICK_SECONDS):
            seconds = time.monotonic() - started
            print(f"  {title}: {seconds:4.0f} s, {size_mib(watched):5d} MiB on disk", flush=True)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        result = subprocess.run(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
    finally:
        done.set()
        teller.join()
    if result.returncode != 0:
        sys.exit(f"{result.stdout}\n{title} failed; the command was: {' '.join(command)}")
    print(f"  {title}: done in {time.monotonic() - started:.1f} s", flush=True)


def main(target: Path) -> None:
    """Install into `target`."""
    if sys.version_info < (3, 11):  # noqa: UP036
        sys.exit(f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}. Set PYTHON=/path/to/python3.11")
    mark = target / ".installed"
    if mark.is_file() and mark.read_text() == stamp():
        return
    started = time.monotonic()
    print("Installing into .venv (about 6 GB, most of it torch), once:", flush=True)
    if target.exists():
        shutil.rmtree(target)
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "UV_NO_PROGRESS": "1", "UV_LINK_MODE": "hardlink"}
    env.pop("VIRTUAL_ENV", None)
    python = str(target / "bin" / "python")
    run("environment", [sys.executable, "-m", "venv", str(target)], target, env)
    pip = [python, "-m", "pip", "install", "--quiet", "--require-hashes"]
    run("installer", [*pip, "-r", str(ROOT / "requirements/bootstrap.txt")], target, env)
    uv = [str(target / "bin" / "uv"), "pip", "install", "--python", python]
    run("dependencies", [*uv, "--require-hashes", "-r", str(ROOT / "requirements/dev.txt")], target, env)
    run("this project", [*uv, "--no-deps", "--no-build-isolation", "-e", str(ROOT)], target, env)
    mark.write_text(stamp())
    print(f"Installed in {time.monotonic() - started:.0f} s.", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
