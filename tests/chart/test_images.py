"""The images' files: pinned, locked, labelled, not root; and what their builds filter and write."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "images").glob("*.Dockerfile"))
INDEX = "some-index"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_image_is_pinned_locked_labelled_and_not_root(file: Path) -> None:
    text = file.read_text()
    assert re.search(r"^ARG PYTHON_IMAGE=python:3\.\d+\.\d+-slim-\w+@sha256:[0-9a-f]{64}$", text, re.MULTILINE)
    # Its own stages, a base by its digest, or nothing at all.
    assert set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) <= {"${PYTHON_IMAGE}", "scratch", "dependencies"}
    # Dependencies, our own code, and what becomes of the two.
    assert len(re.findall(r"^FROM ", text, re.MULTILINE)) == 3
    assert text.count("--require-hashes") >= 2
    assert "SBOM" in text.upper()
    for label in ("title", "description", "version", "revision", "source", "licenses"):
        assert f"org.opencontainers.image.{label}=" in text
    (user,) = re.findall(r"^USER (\d+):\d+$", text, re.MULTILINE)
    assert int(user) > 0
    for copied in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        assert [name for name in copied.split() if not (ROOT / name).exists()] == []
    assert re.search(rf"^image-{file.stem}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("file", [file for file in FILES if file.stem != "operator"], ids=lambda file: file.stem)
def test_a_change_of_our_code_is_a_layer_of_its_own(file: Path) -> None:
    """What comes before it in the trainers' images must not name our code, nor what differs between two releases."""
    dependencies, _, final = file.read_text().split("\nFROM ", maxsplit=1)[1].split("\nFROM ")
    copied = " ".join(re.findall(r"^COPY (.+) \S+$", dependencies, re.MULTILINE)).split()
    assert [name for name in copied if not name.startswith(("requirements/", "images/without_cuda"))] == []
    before, last = final.split("COPY --from=dependencies /app /app\nCOPY --from=own /own /app\n")
    assert [line for line in before.splitlines()[1:] if not line.startswith("#")] == []
    assert "ARG REVISION" in last


def test_there_is_an_image_for_each_way_to_train() -> None:
    assert {file.stem for file in FILES} == {"operator", "trainer-cpu", "trainer-cpu-ipex", "trainer-cuda"}


def run(script: str, *arguments: str, stdin: str = "") -> str:
    command = [sys.executable, str(ROOT / "images" / script), *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=True).stdout


def test_the_cpu_image_takes_torch_from_its_own_index_and_the_rest_from_the_lock() -> None:
    lock = (ROOT / "requirements/trainer.txt").read_text()
    assert run("without_cuda.py", "", stdin=lock) == lock
    filtered = run("without_cuda.py", INDEX, stdin=lock)
    names = set(re.findall(r"^([\w.-]+)==", filtered, re.MULTILINE))
    assert {"diffusers", "safetensors", "numpy", "sympy"} <= names
    assert not {name for name in names if name.startswith(("torch", "nvidia", "triton", "cuda"))}
    # No hash is left over from an entry that went.
    entry = r"^\S+==[^\n]*\\\n(?: +--hash=\S+ \\\n)* +--hash=\S+\n"
    assert re.sub(entry, "", filtered, flags=re.MULTILINE).strip() == ""


def test_an_sbom_names_every_distribution(tmp_path: Path) -> None:
    out = tmp_path / "share" / "sbom.spdx.json"
    site_packages = next(Path(sys.prefix).glob("lib/python3*/site-packages"))
    run("sbom.py", str(out), "tests", str(site_packages), "/usr/bin/env")
    document = json.loads(out.read_text())
    assert document["spdxVersion"] == "SPDX-2.3"
    named = {package["name"].lower() for package in document["packages"]}
    assert {"python", "aiohttp", "pydantic", "kopf"} <= named
    identities = [package["SPDXID"] for package in document["packages"]]
    assert len(identities) == len(set(identities))
    first = out.read_text()
    run("sbom.py", str(out), "tests", str(site_packages), "/usr/bin/env")
    assert out.read_text() == first
