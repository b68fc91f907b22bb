"""Translates a pod manifest into a process of this machine: command, environment, paths. Pure.

A local pod has no mount namespace, no pod network and no container image. Paths, host names and variables that these
would provide are rewritten in the environment and the arguments of the process.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_contract import environment
from finetune_operator.plan.model.types import Manifest

LOOPBACK = "127.0.0.1"
LOOPBACK_INTERFACE = "lo"
TERMINATION_LOG = "/dev/termination-log"
"""Kubernetes' default terminationMessagePath."""
MACHINE_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108
"""Folders that a pod may mount, but a longer path below them most likely means a file of this machine."""
INHERITED_VARIABLES = (
    *("PATH", "HOME", "USER", "LANG", "LC_ALL", "TZ", "PYTHONPATH", "LD_LIBRARY_PATH"),
    *("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_TOKEN", "SSL_CERT_FILE"),
    *("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT", "HF_HUB_DISABLE_XET"),
    *("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"),
)
"""All variables that a pod inherits. They replace the image's environment and an administrator's settings."""

_REFERENCE = re.compile(r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_.-]*)\)")


class UnsupportedError(Exception):
    """The manifest requires something that a local run does not support. The message is for the user."""


@dataclass(frozen=True)
class LocalResources:
    """Folders, port and devices of this machine that a pod uses."""

    folders: Mapping[str, Path]
    """Folder of each volume, by the volume's name."""
    termination_log: Path
    temporary: Path
    node: str
    master_port: int
    gpus: Sequence[str] = ()


@dataclass(frozen=True)
class Container:
    """A process to start."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    working_folder: Path | None
    """None means the pod's own temporary folder."""


def main_container(pod: Manifest) -> Manifest:
    """Return the container that trains, which is the first. Sidecars of a podTemplate do not run locally."""
    container: Manifest = pod["spec"]["containers"][0]
    return container


def build_container(pod: Manifest, resources: LocalResources, base: Mapping[str, str], resolve: Resolve) -> Container:
    """Translate a pod's main container.

    Args:
        pod: the manifest, with its UID.
        resources: what the pod uses of this machine.
        base: environment of this process; only `INHERITED_VARIABLES` are copied.
        resolve: finds a command of this installation.

    Raises:
        UnsupportedError: a variable has a source that does not exist locally, or the pod has no command.
    """
    container = main_container(pod)
    paths = _MountedPaths.of(container, resources)
    declared = _declared_environment(pod, container, resources)
    env = {name: base[name] for name in INHERITED_VARIABLES if name in base}
    env |= {name: paths.rewrite(value) for name, value in declared.items()}
    env |= _network_environment(declared, resources)
    env["TMPDIR"] = str(paths.folder("/tmp") or resources.temporary)  # noqa: S108  the container's, not ours
    if resources.gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(resources.gpus)
    command = [*(container.get("command") or ()), *(container.get("args") or ())]
    if not command:
        raise UnsupportedError("the pod has no command, and a local run has no image with a default command")
    argv = [paths.rewrite(expand_references(word, declared)) for word in command]
    folder = container.get("workingDir")
    return Container((*resolve(argv[0]), *argv[1:]), env, Path(paths.rewrite(folder)) if folder else None)


Resolve = Callable[[str], Sequence[str]]
"""Maps the first word of a command to the program and arguments that start it on this machine."""


def expand_references(text: str, variables: Mapping[str, str]) -> str:
    """Expand $(NAME) as Kubernetes does: keep unknown names unchanged, and turn $$ into a dollar sign."""

    def replacement(match: re.Match[str]) -> str:
        if match.group() == "$$":
            return "$"
        return variables.get(match.group(1), match.group())

    return _REFERENCE.sub(replacement, text)


@dataclass(frozen=True)
class _MountedPaths:
    """Paths inside the container and the paths of this machine that replace them, the longest first."""

    mounts: Sequence[tuple[str, Path]]

    @classmethod
    def of(cls, container: Manifest, resources: LocalResources) -> _MountedPaths:
        mounts = [
            (mount["mountPath"].rstrip("/"), resources.folders[mount["name"]] / mount.get("subPath", ""))
            for mount in container.get("volumeMounts") or ()
        ]
        mounts.append((container.get("terminationMessagePath") or TERMINATION_LOG, resources.termination_log))
        return cls(sorted(mounts, key=lambda mount: len(mount[0]), reverse=True))

    def folder(self, path: str) -> Path | None:
        """Return the folder that replaces a mountPath."""
        return next((folder for mounted, folder in self.mounts if mounted == path), None)

    def rewrite(self, text: str) -> str:
        """Rewrite a path that is a mount or is below one, also after the `=` of an option."""
        option, equals, value = text.partition("=") if text.startswith("-") else ("", "", text)
        for mounted, folder in self.mounts:
            if value == mounted or (value.startswith(mounted + "/") and mounted not in MACHINE_FOLDERS):
                return f"{option}{equals}{folder}{value[len(mounted) :]}"
        return text


def _network_environment(declared: Mapping[str, str], resources: LocalResources) -> dict[str, str]:
    """Return variables that keep the gang on the loopback interface, with a rendezvous port that is free."""
    env = {"GLOO_SOCKET_IFNAME": LOOPBACK_INTERFACE, "NCCL_SOCKET_IFNAME": LOOPBACK_INTERFACE}
    # No DNS server of this machine's network knows the name of a pod.
    env[environment.MASTER_NAME] = ""
    if environment.MASTER_PORT in declared:
        env[environment.MASTER_PORT] = str(resources.master_port)
    return env


def _declared_environment(pod: Manifest, container: Manifest, resources: LocalResources) -> dict[str, str]:
    """Return the environment that the manifest declares, in order, with references to earlier variables expanded."""
    env: dict[str, str] = {}
    for entry in container.get("env") or ():
        if "valueFrom" in entry:
            value = _read_source(entry["name"], entry["valueFrom"], pod, resources)
        else:
            value = expand_references(str(entry.get("value") or ""), env)
        env[entry["name"]] = value
    return env


def _read_source(name: str, source: Mapping[str, Any], pod: Manifest, resources: LocalResources) -> str:
    if "fieldRef" in source:
        return _read_field(name, source["fieldRef"]["fieldPath"], pod, resources)
    if "secretKeyRef" in source and source["secretKeyRef"].get("optional"):
        return ""
    raise UnsupportedError(
        f"variable {name}: {', '.join(source)} does not exist on this machine; write the value itself"
    )


def _read_field(name: str, path: str, pod: Manifest, resources: LocalResources) -> str:
    metadata = pod["metadata"]
    fields = {
        "metadata.name": metadata["name"],
        "metadata.namespace": metadata.get("namespace", "default"),
        "metadata.uid": metadata["uid"],
        "spec.nodeName": resources.node,
        "spec.serviceAccountName": pod["spec"].get("serviceAccountName", "default"),
        "status.podIP": LOOPBACK,
        "status.podIPs": LOOPBACK,
        "status.hostIP": LOOPBACK,
    }
    if path in fields:
        return str(fields[path])
    if match := re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", path):
        return str((metadata.get(match.group(1)) or {}).get(match.group(2), ""))
    raise UnsupportedError(f"variable {name}: fieldPath {path!r} does not exist on this machine")
