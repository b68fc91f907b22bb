"""What an image's archive says of the image."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MIB = 1 << 20
OPERATOR_MIB = 150


def operator_faults(archive: Path) -> Iterator[str]:
    """A sentence for each thing that the operator's image must not be."""
    with tarfile.open(archive) as opened:
        manifest = _json(opened, "manifest.json")[0]
        config = _json(opened, manifest["Config"])["config"]
        size = sum(opened.getmember(layer).size for layer in manifest["Layers"])
        names = [name for layer in manifest["Layers"] for name in _names(opened, layer)]
    if size > OPERATOR_MIB * MIB:
        yield f"the operator's image has {size / MIB:.0f} MiB unpacked, over {OPERATOR_MIB}"
    if config["User"].split(":")[0] in ("", "0", "root"):
        yield "the operator's image runs as root"
    for unwanted in ("/torch/", "finetune_trainer/", "bin/sh", "bin/bash", "bin/pip"):
        if found := next((name for name in names if unwanted in f"/{name}"), None):
            yield f"the operator's image holds {found}"
    if not any(name.endswith(".spdx.json") for name in names):
        yield "the operator's image has no SBOM"


def size_mib(archive: Path) -> float:
    """Its layers, unpacked."""
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
