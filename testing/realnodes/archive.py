"""Check the archive of an image: size, user, labels, unwanted files, SBOM."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MIB = 1 << 20
OPERATOR_MIB = 150
UNWANTED = {
    "operator": ("/torch/", "finetune_trainer/", "bin/sh", "bin/bash", "bin/pip"),
    "trainer": ("site-packages/finetune_operator/",),
}
LABELS = ("title", "description", "version", "revision", "source", "licenses")


def find_defects(archive: Path, name: str) -> Iterator[str]:
    """Yield a message for each defect of the image with this name."""
    with tarfile.open(archive) as opened:
        manifest = _json(opened, "manifest.json")[0]
        config = _json(opened, manifest["Config"])["config"]
        size = sum(opened.getmember(layer).size for layer in manifest["Layers"])
        names = [inside for layer in manifest["Layers"] for inside in _names(opened, layer)]
    kind = name.split("-", maxsplit=1)[0]
    if kind == "operator" and size > OPERATOR_MIB * MIB:
        yield f"{name} image is {size / MIB:.0f} MiB unpacked; the limit is {OPERATOR_MIB} MiB"
    if config["User"].split(":")[0] in ("", "0", "root"):
        yield f"{name} image runs as root"
    missing = [label for label in LABELS if f"org.opencontainers.image.{label}" not in (config.get("Labels") or {})]
    if missing:
        yield f"{name} image lacks labels: {', '.join(missing)}"
    for unwanted in UNWANTED[kind]:
        if found := next((inside for inside in names if unwanted in f"/{inside}"), None):
            yield f"{name} image contains {found}"
    if not any(inside.endswith(".spdx.json") for inside in names):
        yield f"{name} image has no SBOM"


def size_mib(archive: Path) -> float:
    """Return the unpacked size of the layers in MiB."""
    with tarfile.open(archive) as opened:
        layers = _json(opened, "manifest.json")[0]["Layers"]
        return sum(opened.getmember(layer).size for layer in layers) / MIB


def _names(opened: tarfile.TarFile, layer: str) -> list[str]:
    inner = opened.extractfile(layer)
    assert inner is not None
    with tarfile.open(fileobj=inner) as files:
        return files.getnames()


def _json(opened: tarfile.TarFile, name: str) -> Any:
    file = opened.extractfile(name)
    assert file is not None
    return json.load(file)
