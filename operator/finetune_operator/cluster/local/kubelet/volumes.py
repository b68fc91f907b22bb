"""Folders in place of volumes. Blocking: use a thread."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from finetune_operator.cluster.local.home import Home
from finetune_operator.cluster.local.kubelet.container import UnsupportedError
from finetune_operator.plan.model.types import Manifest

SHARED_VOLUME = "checkpoints"
"""The emptyDir that all pods share here, as they would share a claim on a cluster."""
Configs = Callable[[str], Mapping[str, str] | None]
"""Data of a ConfigMap; None: there is none."""


class NotYetError(Exception):
    """Something that the pod mounts does not exist yet; the message says what."""


def prepare_volumes(pod: Manifest, pod_folder: Path, home: Home, configs: Configs) -> dict[str, Path]:
    """Make the folder behind each volume of a pod and fill it.

    Returns:
        The folders by the volumes' names.

    Raises:
        NotYetError: a ConfigMap is missing.
        UnsupportedError: a kind of volume that this machine does not have.
        OSError: a folder cannot be made or written.
    """
    return {
        volume["name"]: _prepare(volume, pod_folder / "volumes" / volume["name"], home, configs)
        for volume in pod["spec"].get("volumes") or ()
    }


def missing_configs(pod: Manifest, configs: Configs) -> list[str]:
    """Names of the ConfigMaps that a pod needs and that do not exist."""
    volumes = pod["spec"].get("volumes") or ()
    projected = [source for volume in volumes for source in (volume.get("projected") or {}).get("sources") or ()]
    wanted = [source["configMap"] for source in (*volumes, *projected) if "configMap" in source]
    return [config["name"] for config in wanted if not config.get("optional") and configs(config["name"]) is None]


def token_files(pod: Manifest, pod_folder: Path) -> list[Path]:
    """Files of this pod that hold a token."""
    return [
        pod_folder / "volumes" / volume["name"] / source["serviceAccountToken"]["path"]
        for volume in pod["spec"].get("volumes") or ()
        for source in (volume.get("projected") or {}).get("sources") or ()
        if "serviceAccountToken" in source
    ]


def _prepare(volume: Mapping[str, Any], own: Path, home: Home, configs: Configs) -> Path:
    name = volume["name"]
    if "emptyDir" in volume:
        return _made(home.storage if name == SHARED_VOLUME else own)
    if "hostPath" in volume:
        return _made(_absolute(name, volume["hostPath"]["path"]))
    if "persistentVolumeClaim" in volume:
        return _made(home.claim(volume["persistentVolumeClaim"]["claimName"]))
    if "configMap" in volume:
        _write_config(_made(own), volume["configMap"], configs)
        return own
    if "projected" in volume:
        for source in volume["projected"].get("sources") or ():
            _project(name, _made(own), source, configs)
        return own
    kinds = ", ".join(sorted(set(volume) - {"name"})) or "no source"
    raise UnsupportedError(
        f"volume {name}: {kinds} does not exist on this machine; use hostPath, or persistentVolumeClaim for a folder"
    )


def _project(volume: str, folder: Path, source: Mapping[str, Any], configs: Configs) -> None:
    if "serviceAccountToken" in source:
        _write_private(folder / source["serviceAccountToken"]["path"], secrets.token_urlsafe(32))
    elif "configMap" in source:
        _write_config(folder, source["configMap"], configs)
    else:
        raise UnsupportedError(f"volume {volume}: {', '.join(source)} cannot be projected on this machine")


def _write_config(folder: Path, config: Mapping[str, Any], configs: Configs) -> None:
    data = configs(config["name"])
    if data is None:
        if config.get("optional"):
            return
        raise NotYetError(f'configmap "{config["name"]}" not found')
    items = config.get("items") or [{"key": key, "path": key} for key in data]
    for item in items:
        if item["key"] not in data:
            raise UnsupportedError(f'configmap "{config["name"]}" has no key {item["key"]!r}')
        path = folder / item["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(data[item["key"]], encoding="utf-8")


def _write_private(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_text(text, encoding="utf-8")


def _absolute(volume: str, path: str) -> Path:
    if not path.startswith("/"):
        raise UnsupportedError(f"volume {volume}: hostPath {path!r} is not an absolute path")
    return Path(path)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
