"""The Dockerfiles are pinned, locked, labelled and non-root; the scripts of their builds filter and write correctly."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import pytest

from finetune_contract.requirements import find_missing_software
from finetune_contract.spec import Optimizer, TrackerName, TrainingSpec

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "images").glob("*.Dockerfile"))
INDEX = "cpu-index"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_image_is_pinned_locked_labelled_and_not_root(file: Path) -> None:
    text = file.read_text()
    assert re.search(r"^ARG PYTHON_IMAGE=python:3\.\d+\.\d+-slim-\w+@sha256:[0-9a-f]{64}$", text, re.MULTILINE)
    # Every stage starts from the pinned base, another stage, or an empty image.
    assert set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) <= {"${PYTHON_IMAGE}", "scratch", "base", "dependencies"}
    # The stages: dependencies, own code, and the final image; for trainers also their base with a compiler,
    # and the examples of diffusers. On GPUs also a stage with the libraries of a network adapter.
    stages = {"operator": 3, "trainer-cuda": 6, "trainer-export": 4}
    assert len(re.findall(r"^FROM ", text, re.MULTILINE)) == stages.get(file.stem, 5)
    assert text.count("--require-hashes") >= 2
    assert "SBOM" in text.upper()
    for label in ("title", "description", "version", "revision", "source", "licenses"):
        assert f"org.opencontainers.image.{label}=" in text
    (user,) = re.findall(r"^USER (\d+):\d+$", text, re.MULTILINE)
    assert int(user) > 0
    copied = " ".join(re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE)).split()
    assert "requirements/bootstrap.txt" in copied
    assert [name for name in copied if not (ROOT / name).exists()] == []
    assert re.search(rf"^image-{file.stem}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("file", [file for file in FILES if file.stem != "operator"], ids=lambda file: file.stem)
def test_a_code_change_changes_only_the_last_layer(file: Path) -> None:
    """The layers before it contain no own code and nothing else that differs between two releases."""
    base, dependencies, *_, final = file.read_text().split("\nFROM ", maxsplit=1)[1].split("\nFROM ")
    assert not re.search(r"^(COPY|ARG)", base, re.MULTILINE)
    copied = " ".join(re.findall(r"^COPY (.+) \S+$", dependencies, re.MULTILINE)).split()
    assert copied
    assert [name for name in copied if not name.startswith(("requirements/", "images/without_cuda"))] == []
    before, last = final.split("COPY --from=dependencies /app /app\nCOPY --from=own /own /app\n")
    assert [line for line in before.splitlines()[1:] if not line.startswith(("#", "COPY --from=efa "))] == []
    assert "ARG REVISION" in last


NOT_SHIPPED = {TrackerName.MLFLOW}
"""Trackers that docs/methods.md tells users to add to an image of their own: with its dependencies it is large."""
GPU_ONLY = {Optimizer.ADAMW_8BIT}
"""Optimizers that the API refuses with accelerator cpu."""


NOT_TRAINING = {"operator", "trainer-export"}
"""Images in which no rank trains."""


@pytest.mark.parametrize("file", [file for file in FILES if file.stem not in NOT_TRAINING], ids=lambda file: file.stem)
def test_a_trainer_image_contains_what_the_api_offers(file: Path) -> None:
    """All trackers, compiled models, and the optimizers that the API accepts for the accelerator of the image."""
    text = file.read_text()
    (lock,) = set(re.findall(r"requirements/(trainer\S*\.txt)", text))
    packages = set(re.findall(r"^([\w.-]+)==", (ROOT / "requirements" / lock).read_text(), re.MULTILINE))
    base, _, rest = text.partition(" AS base\n")[2].partition("\nFROM ")
    # The final image, the last stage, starts from the stage that installs the compiler.
    assert rest.rpartition("\nFROM ")[2].startswith("base\n")
    programs = set(" ".join(re.findall(r"apt-get install [- \w]+?recommends (.+?) \\", base)).split())
    optimizers = set(Optimizer) if file.stem == "trainer-cuda" else set(Optimizer) - GPU_ONLY
    trackers = tuple(name for name in TrackerName if name not in NOT_SHIPPED)
    missing = [
        message
        for optimizer in optimizers
        for message in find_missing_software(
            TrainingSpec(optimizer=optimizer, compile=True, trackers=trackers),
            packages.__contains__,
            lambda name: name if name in programs else None,
        )
    ]
    assert missing == []
    # docs/methods.md names their formats.
    assert {"pillow", "pillow-heif"} <= packages


def test_the_network_libraries_of_the_gpu_image_are_an_option_and_checked() -> None:
    stage = (ROOT / "images/trainer-cuda.Dockerfile").read_text().partition("\nFROM dependencies AS efa\n")[2]
    stage = stage.partition("\nFROM ")[0]
    defaults = dict(re.findall(r"^ARG (\w+)=(\S+)$", stage, re.MULTILINE))
    assert defaults.pop("EFA") == "0"
    script = (ROOT / "images/efa.sh").read_text()
    # Every download has a version and a checksum, and the checksum is compared before the archive is unpacked.
    names = [name.removesuffix("_VERSION") for name in defaults if name.endswith("_VERSION")]
    assert sorted(names) == ["AWS_OFI_NCCL", "CUDA", "LIBFABRIC", "RDMA_CORE"]
    assert all(re.fullmatch(r"[0-9a-f]{64}", value) for name, value in defaults.items() if name.endswith("_SHA256"))
    # The headers belong to the runtime of the lock file, and pip checks their hash.
    assert f"nvidia-cuda-runtime=={defaults['CUDA_VERSION']} " in (ROOT / "requirements/trainer-cuda.txt").read_text()
    assert "--require-hashes" in script
    names.remove("CUDA")
    downloads = re.findall(r'^fetch "[^"]+\$(\w+)_VERSION[^"]*"\s(?:\\\n\s+)?"\$(\w+)_SHA256"$', script, re.MULTILINE)
    assert sorted(downloads) == [(name, name) for name in sorted(names)]
    assert script.count("curl ") == 2  # the package, and the function
    assert script.index("sha256sum --check") < script.index("tar --extract")
    assert set(re.findall(r"\$([A-Z]\w+)", script)) <= defaults.keys()


def test_the_script_of_the_network_libraries_refuses_a_changed_archive(tmp_path: Path) -> None:
    """The function that downloads, with the archive of another release on this machine."""
    function = re.search(r"^fetch\(\) \{.*?^\}$", (ROOT / "images/efa.sh").read_text(), re.DOTALL | re.MULTILINE)
    assert function is not None
    archive = tmp_path / "libfabric.tar"
    (tmp_path / "libfabric").mkdir()
    (tmp_path / "libfabric/configure").write_text("")
    subprocess.run(["tar", "-cf", archive, "-C", tmp_path, "libfabric"], check=True)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()

    def fetch(checksum: str) -> int:
        script = f"set -eu\n{function[0]}\nfetch libfabric.tar {checksum}\ntest -e configure\n"
        env = {**os.environ, "EFA_SOURCES": tmp_path.as_uri()}
        return subprocess.run(["sh", "-c", script], cwd=tmp_path, env=env, capture_output=True, check=False).returncode

    assert fetch(digest) == 0
    assert fetch(64 * "0") != 0


def test_every_image_is_listed_here() -> None:
    assert {file.stem for file in FILES} == {
        *("operator", "trainer-cpu", "trainer-cpu-intel", "trainer-cuda", "trainer-export")
    }


def test_the_cpu_images_state_what_they_contain() -> None:
    texts = {name: (ROOT / f"images/{name}.Dockerfile").read_text() for name in ("trainer-cpu", "trainer-cpu-intel")}
    stated = {name: re.findall(r'image\.description="(.*)"', text)[0] for name, text in texts.items()}
    assert "no IPEX, no oneCCL" in stated["trainer-cpu"]
    lock = (ROOT / "requirements/trainer-intel.txt").read_text()
    for package, name in (("torch", "torch"), ("intel-extension-for-pytorch", "IPEX")):
        release = re.search(rf"^{package}==(\d+\.\d+)\.", lock, re.MULTILINE)
        assert release is not None
        assert f"{name} {release[1]}" in stated["trainer-cpu-intel"]
    text = texts["trainer-cpu-intel"]
    # The binding is on no ordinary index: its address is an argument of the build.
    assert re.search(r"^ARG ONECCL_INDEX=$", text, re.MULTILINE)
    assert "'oneccl_bind_pt==2.8.*'" in text
    assert "oneccl_bind_pt 2.8" in stated["trainer-cpu-intel"]
    # What the ranks preload, and nothing that the supervisor would take for settings of the user.
    assert re.search(r"^intel-openmp==", lock, re.MULTILINE)
    assert {"libtcmalloc-minimal4", "libjemalloc2"} <= set(text.split())
    assert not re.search(r"\b(CCL|FI|KMP|OMP)_\w+=", text)


def test_the_export_image_has_the_packages_of_the_extra_export() -> None:
    lock = (ROOT / "requirements/export.txt").read_text()
    assert set(re.findall(r"^(openvino|optimum-intel|nncf)(?:\[.*\])?==", lock, re.MULTILINE)) == {
        *("openvino", "optimum-intel", "nncf")
    }


def run(script: str, *arguments: str, stdin: str = "") -> str:
    command = [sys.executable, str(ROOT / "images" / script), *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=True).stdout


def test_the_cpu_image_omits_torch_and_cuda_from_the_lock() -> None:
    lock = (ROOT / "requirements/trainer.txt").read_text()
    assert run("without_cuda.py", "", stdin=lock) == lock
    filtered = run("without_cuda.py", INDEX, stdin=lock)
    names = set(re.findall(r"^([\w.-]+)==", filtered, re.MULTILINE))
    assert {"diffusers", "safetensors", "numpy", "sympy"} <= names
    assert not {name for name in names if name.startswith(("torch", "nvidia", "triton", "cuda"))}
    # No hash of a removed entry remains.
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
    # The same packages give the same bytes.
    first = out.read_text()
    run("sbom.py", str(out), "tests", str(site_packages), "/usr/bin/env")
    assert out.read_text() == first


@pytest.mark.parametrize("is_intact", [True, False])
def test_the_examples_of_diffusers_are_checked(is_intact: bool, tmp_path: Path) -> None:
    release = version("diffusers")
    archive = tmp_path / "sources" / "archive" / "refs" / "tags" / f"v{release}.tar.gz"
    archive.parent.mkdir(parents=True)
    script = tmp_path / "train.py"
    script.write_text("print(1)\n", encoding="utf-8")
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(script, f"diffusers-{release}/examples/controlnet/train.py")
        tar.add(script, f"diffusers-{release}/src/other.py")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest() if is_intact else "0" * 64
    app = tmp_path / "app" / "bin"
    app.mkdir(parents=True)
    (app / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n', encoding="utf-8")
    (app / "python").chmod(0o755)
    env = {**os.environ, "DIFFUSERS_SOURCES": (tmp_path / "sources").as_uri(), "DIFFUSERS_SHA256": digest}
    target = tmp_path / "examples"
    command = ["sh", str(ROOT / "images/examples.sh"), str(app.parent), str(target)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (result.returncode == 0) is is_intact, result.stderr
    assert [str(path.relative_to(target)) for path in target.rglob("*.py")] == (
        ["controlnet/train.py"] if is_intact else []
    )


def test_an_image_without_examples_has_an_empty_folder(tmp_path: Path) -> None:
    command = ["sh", str(ROOT / "images/examples.sh"), "/none", str(tmp_path / "examples")]
    subprocess.run(command, env={**os.environ, "DIFFUSERS_SHA256": ""}, check=True)
    assert list((tmp_path / "examples").iterdir()) == []
