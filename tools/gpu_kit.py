"""Make `gpu-kit/`: a folder that measures this project on a machine with a GPU and without a network.

The folder contains the source, the wheels that such a machine lacks (no torch), and `measure.py`. The wheels are the
releases of the lock file. They are downloaded for the Python of the other machine; with --installed they are packed
from this environment, which needs no network, for a machine with the same Python as this one.

Usage: python -m tools.gpu_kit [--out gpu-kit] [--python 3.12] [--platform x86_64] [--installed]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = "requirements/dev.txt"
MAX_BYTES = 60 * 2**20
"""Largest kit."""
SCRIPT = "measure.py"
DESCRIPTION = "kit.json"
SOURCES = {
    "operator/finetune_operator": "operator/finetune_operator",
    "trainer/finetune_contract": "trainer/finetune_contract",
    "trainer/finetune_trainer": "trainer/finetune_trainer",
    "bench": "bench",
    "testing/__init__.py": "testing/__init__.py",
    "testing/gpu_kit": "testing/gpu_kit",
    "testing/measure": "testing/measure",
    "testing/trainer/__init__.py": "testing/trainer/__init__.py",
    "testing/trainer/tiny.py": "testing/trainer/tiny.py",
}
"""What is copied, and where to below source/."""
WHEELS = (
    # Models, and what they import.
    *("diffusers", "importlib-metadata", "zipp", "requests", "urllib3", "certifi", "charset-normalizer", "idna"),
    # Pictures.
    *("pillow", "pillow-heif"),
    # The command, the coordinator and the heartbeats.
    *("httptools", "cryptography", "cffi", "pycparser"),
    *("pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions"),
    *("rich", "markdown-it-py", "mdurl", "pygments"),
)
"""What a job and the measurements import, and torch, transformers, accelerate and peft do not bring."""
_PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")


class KitError(Exception):
    """The kit cannot be made. The message is for the user."""


def locked(lock: str, names: Iterable[str]) -> str:
    """Return the entries of a lock file for these packages, with their hashes.

    Raises:
        KitError: the lock file lacks one.
    """
    entries = {
        re.split(r"[=\s]", entry)[0]: entry for entry in re.split(r"\n(?=[\w.-]+==)", lock) if not entry.startswith("#")
    }
    if missing := sorted(set(names) - set(entries)):
        raise KitError(f"{LOCK} lacks {', '.join(missing)}; correct the list of wheels in tools/gpu_kit.py")
    return "\n".join(
        "\n".join(line for line in entries[name].splitlines() if not line.lstrip().startswith("#")) for name in names
    )


def download(target: Path, python: str, platform: str) -> None:
    """Download the wheels for another machine, and check their hashes.

    Raises:
        KitError: a wheel cannot be downloaded.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(locked((ROOT / LOCK).read_text(encoding="utf-8"), WHEELS))
        file.flush()
        options = [f"--platform={name}_{platform}" for name in _PLATFORMS]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--require-hashes", f"--python-version={python}", *options]
        ended = subprocess.run([*command, f"--dest={target}", f"--requirement={file.name}"], check=False)
    if ended.returncode != 0:
        raise KitError(f"pip cannot download the wheels for Python {python} on {platform}; see its message above")


def pack_installed(target: Path) -> None:
    """Pack the wheels from the files of this environment.

    Raises:
        KitError: a package is not installed.
    """
    for name in WHEELS:
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError as error:
            raise KitError(f"{name} is not installed here; run make install, or leave --installed out") from error
        tag = re.search(r"^Tag: (\S+)", package.read_text("WHEEL") or "", re.M)
        stem = f"{re.sub(r'[-_.]+', '_', name)}-{package.version}-{tag[1] if tag else 'py3-none-any'}"
        with zipfile.ZipFile(target / f"{stem}.whl", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as wheel:
            for file in package.files or ():
                if ".." not in file.parts and file.suffix != ".pyc":
                    wheel.write(str(file.locate()), str(file))


def copy_sources(target: Path) -> None:
    """Copy the source without bytecode."""
    for source, copy in SOURCES.items():
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, target / copy, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        else:
            (target / copy).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / source, target / copy)


def size_of(folder: Path) -> int:
    """Return the size of all files in a folder in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check_size(kit: Path, most: int = MAX_BYTES) -> None:
    """Check the size of a kit.

    Raises:
        KitError: it is too large; the message names the largest files.
    """
    if size_of(kit) <= most:
        return
    largest = sorted((path for path in kit.rglob("*") if path.is_file()), key=lambda path: -path.stat().st_size)[:3]
    names = ", ".join(f"{path.name} ({path.stat().st_size / 2**20:.1f} MiB)" for path in largest)
    raise KitError(
        f"{kit} has {size_of(kit) / 2**20:.1f} MiB; at most {most / 2**20:.0f} MiB may be carried. The largest: {names}"
    )


def make(kit: Path, python: str, platform: str, installed: bool) -> None:
    """Make the folder; an earlier kit in its place is replaced.

    Raises:
        KitError: it cannot be made, or is too large.
    """
    if kit.exists():
        if any(kit.iterdir()) and not (kit / DESCRIPTION).exists():
            raise KitError(f"{kit} exists and is not a kit; write another folder with --out")
        shutil.rmtree(kit)
    wheels = kit / "wheels"
    wheels.mkdir(parents=True)
    if installed:
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        pack_installed(wheels)
    else:
        download(wheels, python, platform)
    copy_sources(kit / "source")
    shutil.copy(ROOT / "bench" / "gpu_kit" / SCRIPT, kit / SCRIPT)
    (kit / DESCRIPTION).write_text(json.dumps({"python": python, "platform": platform}) + "\n", encoding="utf-8")
    check_size(kit)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the kit, and print its size."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_kit", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-kit", help="folder to make (default: gpu-kit)")
    parser.add_argument("--python", default="3.12", help="Python of the other machine (default: 3.12)")
    parser.add_argument("--platform", default="x86_64", help="its processor: x86_64 (default) or aarch64")
    parser.add_argument("--installed", action="store_true", help="pack the wheels from this environment")
    options = parser.parse_args(arguments)
    try:
        make(options.out, options.python, options.platform, options.installed)
    except KitError as error:
        print(f"gpu-kit: {error}", file=sys.stderr)
        return 1
    print(f"{options.out}: {size_of(options.out) / 2**20:.1f} MiB; run: python3 {options.out.name}/{SCRIPT} --help")
    return 0


if __name__ == "__main__":
    sys.exit(main())
