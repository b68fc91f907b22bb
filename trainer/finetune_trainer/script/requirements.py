"""Installs the requirements of a script once into the job's cache: shared by its ranks and attempts."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from finetune_contract.heartbeat import MAX_LAST_OUTPUT
from finetune_trainer.errors import ConfigError, NetworkError
from finetune_trainer.files import write_atomically
from finetune_trainer.script.checkpoints import remove_tree

FOLDER = "script-requirements"
DONE = ".installed"
_UNREACHABLE = (
    "NewConnectionError",
    "Temporary failure in name resolution",
    "Network is unreachable",
    "ConnectTimeoutError",
    "Failed to establish a new connection",
    "ProxyError",
    "ReadTimeoutError",
    "Max retries exceeded",
)
"""Parts of pip's messages if it reaches no index."""

_TORCH = re.compile(r"torch\s*([=<>!~@\[;]|$)")
"""A requirement of torch itself. Without one, packages such as torchvision must fit the installed torch."""


def folder_name(requirements: Sequence[str]) -> str:
    """Return the name of the folder of a list of requirements for this version of Python."""
    text = "\n".join([f"{sys.implementation.cache_tag}", *requirements])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def install(requirements: Sequence[str], cache_dir: Path) -> Path | None:
    """Install requirements unless that is done, and return their folder; None if there are none.

    The first rank installs, the others wait for its lock.

    Raises:
        ConfigError: a requirement is invalid or does not exist.
        NetworkError: no package index can be reached.
        OSError: the cache cannot be written.
    """
    if not requirements:
        return None
    folder = cache_dir / FOLDER / folder_name(requirements)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / DONE).exists():
            remove_tree(folder, ignore_errors=True)
            _run_pip(requirements, folder)
            write_atomically(folder / DONE, b"")
    return folder


def _run_pip(requirements: Sequence[str], folder: Path) -> None:
    """Install what the environment lacks. An installation into a folder alone would repeat torch and all others."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write(f"torch=={version('torch')}\n")
        constraints.flush()
        pinned = [] if any(_TORCH.match(each) for each in requirements) else ["--constraint", constraints.name]
        report = _pip("install", "--dry-run", "--report", "-", *pinned, *requirements)
    missing = [
        f"{each['metadata']['name']} @ {each['download_info']['url']}"
        if each.get("is_direct")
        else f"{each['metadata']['name']}=={each['metadata']['version']}"
        for each in json.loads(report)["install"]
    ]
    folder.mkdir(parents=True)
    if missing:
        _pip("install", "--no-deps", "--target", str(folder), *missing)


def pip_command() -> list[str]:
    """Return the command of pip. The images contain only the copy that is part of Python."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    ensurepip = importlib.util.find_spec("ensurepip")
    folders = ensurepip.submodule_search_locations if ensurepip is not None else None
    wheels = sorted(Path(folders[0]).glob("_bundled/pip-*.whl")) if folders else []
    if not wheels:
        raise ConfigError("training.script.requirements: the image has no pip; write an image that has the packages")
    return [sys.executable, str(wheels[-1] / "pip")]


def _pip(*arguments: str) -> str:
    """Run pip and return its output.

    Raises:
        ConfigError: a requirement is invalid or does not exist.
        NetworkError: no package index can be reached.
    """
    command = [*pip_command(), "--quiet", "--disable-pip-version-check", "--no-input", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return result.stdout
    lines = [line for line in result.stderr.strip().splitlines() if line.strip()]
    last = (next((line for line in reversed(lines) if "ERROR" in line), lines[-1] if lines else ""))[-MAX_LAST_OUTPUT:]
    if any(part in result.stderr for part in _UNREACHABLE):
        raise NetworkError(
            "training.script.requirements: no package index can be reached; allow the pods to reach one (PIP_INDEX_URL "
            f"in env names a mirror), or write an image that contains the packages: {last}"
        )
    raise ConfigError(f"training.script.requirements: pip cannot install them: {last}")
