"""Prepares a folder for each volume of a pod. Blocking: call in a thread."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from finetune_operator.cluster.local.home import Home
from finetune_operator.cluster.local.kubelet.container import UnsupportedError
from finetune_operator.plan.model.types import Manifest

SHARED_VOLUME = "checkpoints"
"""The emptyDir that all pods share in a local run, as they share a claim on a cluster."""
Configs = Callable[[str], Mapping[str, str] | None]
"""Returns the data of the ConfigMap with a name; None if it does not exist."""


class MissingConfigError(Exception):
    """A ConfigMap that the pod mounts does not exist yet. The message names it."""


def prepare_volumes(pod: Manifest, pod_folder: Path, home: Home, configs: Configs) -> dict[str, Path]:
    """Create and fill the folder of each volume of a pod.

    Returns:
        The folders by the volumes' names.

    Raises:
        MissingConfigError: a ConfigMap does not exist.
        UnsupportedError: a local run does not support this kind of volume.
        OSError: a folder cannot be created or written.
    """
    return {
        volume["name"]: _prepare(volume, pod_folder / "volumes" / volume["name"], home, configs)
        for volume in pod["spec"].get("volumes") or ()
    }


def missing_configs(pod: Manifest, configs: Configs) -> list[str]:
    """Return the names of the ConfigMaps that a pod needs and that do not exist."""
    volumes = pod["spec"].get("volumes") or ()
    projected = [source for volume in volumes for source in (volume.get("projected") or {}).get("sources") or ()]
    mounted = [source["configMap"] for source in (*volumes, *projected) if "configMap" in source]
    return [config["name"] for config in mounted if not config.get("optional") and configs(config["name"]) is None]


def token_files(pod: Manifest, pod_folder: Path) -> list[Path]:
    """Return the files of a pod that contain a token."""
    return [
        pod_folder / "volumes" / volume["name"] / source["serviceAccountToken"]["path"]
        for volume in pod["spec"].get("volumes") or ()
        for source in (volume.get("projected") or {}).get("sources") or ()
        if "serviceAccountToken" in source
    ]


def _prepare(volume: Mapping[str, Any], own: Path, home: Home, configs: Configs) -> Path:
    name = volume["name"]
    if "emptyDir" in volume:
        return _ensure_folder(home.storage if name == SHARED_VOLUME else own)
    if "hostPath" in volume:
        return _ensure_folder(_absolute(name, volume["hostPath"]["path"]))
    if "persistentVolumeClaim" in volume:
        return _ensure_folder(home.claim(volume["persistentVolumeClaim"]["claimName"]))
    if "configMap" in volume:
        _write_config(_ensure_folder(own), volume["configMap"], configs)
        return own
    if "projected" in volume:
        for source in volume["projected"].get("sources") or ():
            _project(name, _ensure_folder(own), source, configs)
        return own
    if "secret" in volume:
        # The processes of a local run have the credentials of the user's own environment.
        return _ensure_folder(own)
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
        raise MissingConfigError(f'configmap "{config["name"]}" not found')
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


def _ensure_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
