"""The operator's extra, installed as in its image, must not install torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "numpy", "triton"}

IMPORT_ALL = """
import importlib, json, pkgutil, sys
import finetune_contract, finetune_operator
for package in (finetune_contract, finetune_operator):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
print(json.dumps(sorted(name.split(".")[0] for name in sys.modules)))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of a new environment that contains only the operator's extra."""
    folder = tmp_path_factory.mktemp("operator-extra") / "venv"
    uv = str(Path(sys.executable).parent / "uv")
    env = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(folder)], check=True, env=env)
    python = folder / "bin/python"
    install = [uv, "pip", "install", "--quiet", "--python", str(python)]
    lock = str(ROOT / "requirements/operator.txt")
    subprocess.run([*install, "--require-hashes", "-r", lock], check=True, env=env)
    subprocess.run([*install, "--no-deps", f"{ROOT}[operator]"], check=True, env=env)
    return python


def test_the_operator_extra_does_not_install_torch(python: Path) -> None:
    listed = subprocess.run(
        [str(Path(sys.executable).parent / "uv"), "pip", "list", "--format", "json", "--python", str(python)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    installed = {entry["name"] for entry in json.loads(listed)}
    assert "kopf" in installed
    assert not installed & HEAVY
    assert not {name for name in installed if name.startswith("nvidia")}


def test_every_module_of_the_operator_imports_without_torch(python: Path, tmp_path: Path) -> None:
    result = subprocess.run([str(python), "-c", IMPORT_ALL], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr
    assert not set(json.loads(result.stdout)) & HEAVY


def test_the_command_prints_its_help(python: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [str(python.parent / "finetune"), "--help"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert result.returncode == 0, result.stderr
    commands = {line.split()[0] for line in result.stdout.splitlines() if line.startswith("    ")}
    assert {"run", "get", "describe", "logs", "delete", "checkpoints", "validate"} <= commands


def test_the_command_runs_without_the_trainer(python: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [str(python.parent / "finetune"), "get", "--home", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (0, "")
    assert result.stderr.startswith("No jobs in namespace default")
