"""Volumes for claims on `make cluster`: folders of this machine that every node can mount, created on demand."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path
from typing import Any

from testing.controlplane.api import Api
from testing.realnodes.store import USER, volume

CLASS = "shared"
SPARE = 2
SIZE = "10Ti"
"""Larger than any example requests; the size of a folder is not limited."""
VOLUMES = "/api/v1/persistentvolumes"
CLASSES = "/apis/storage.k8s.io/v1/storageclasses"
DEFAULT = "storageclass.kubernetes.io/is-default-class"


class Volumes:
    """Provides volumes of the default storage class. The controllers bind claims to free volumes."""

    def __init__(self, api: Api, folder: Path) -> None:
        self._api = api
        self._folder = folder
        self._numbers = itertools.count(1)

    def start(self) -> None:
        """Create the class and the first volumes."""
        metadata = {"name": CLASS, "annotations": {DEFAULT: "true"}}
        kind = {"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": metadata}
        self._api.create(CLASSES, {**kind, "provisioner": "kubernetes.io/no-provisioner"})
        self.maintain()

    def maintain(self) -> None:
        """Keep SPARE volumes free, and remove those whose claim was deleted. Called periodically."""
        volumes = [one for one in self._api.get(VOLUMES)["items"] if one["spec"].get("storageClassName") == CLASS]
        for one in volumes:
            if phase(one) == "Released" and "deletionTimestamp" not in one["metadata"]:
                name = one["metadata"]["name"]
                self._api.delete(f"{VOLUMES}/{name}")
                shutil.rmtree(self._folder / name, ignore_errors=True)
        for _ in range(SPARE - sum(phase(one) in ("Available", "Pending") for one in volumes)):
            self._make(f"{CLASS}-{next(self._numbers)}")

    def _make(self, name: str) -> None:
        folder = self._folder / name
        folder.mkdir(parents=True)
        os.chown(folder, USER, USER)
        self._api.create(VOLUMES, volume(name, folder, CLASS, SIZE))


def phase(thing: dict[str, Any]) -> str:
    """Return the phase of a volume; a new one has none."""
    found: str = thing.get("status", {}).get("phase", "Pending")
    return found
