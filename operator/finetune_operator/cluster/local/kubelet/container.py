"""What a pod manifest means on this machine: command, environment, paths. Pure.

There is no mount namespace, no pod network and no container image here, so what a kubelet would arrange around the
process is written into its environment and arguments instead.
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
SHARED_WITH_THIS_MACHINE = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108
"""Where a pod has a folder of its own, but a path below one of these is likely to mean a file of this machine."""
FROM_THIS_MACHINE = (
    *("PATH", "HOME", "USER", "LANG", "LC_ALL", "TZ", "PYTHONPATH", "LD_LIBRARY_PATH"),
    *("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_TOKEN", "SSL_CERT_FILE"),
    *("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"),
)
"""What stands in for the image and for what an administrator sets: all that a pod inherits."""

_REFERENCE = re.compile(r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_.-]*)\)")


class UnsupportedError(Exception):
    """The manifest asks for what this machine cannot give; the message is a sentence."""


@dataclass(frozen=True)
class Place:
    """What of this machine a pod gets."""

    folders: Mapping[str, Path]
    """Folder behind each volume, by the volume's name."""
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
    """None: the pod's own temporary folder."""


def main_container(pod: Manifest) -> Manifest:
    """The container that trains: the first. Side cars of a podTemplate have no place here."""
    container: Manifest = pod["spec"]["containers"][0]
    return container


def build_container(pod: Manifest, place: Place, base: Mapping[str, str], resolve: Resolve) -> Container:
    """Translate a pod's main container.

    Args:
        pod: the manifest, with its UID.
        place: what it gets.
        base: environment of this process; only `FROM_THIS_MACHINE` is taken.
        resolve: finds a command of this very installation.

    Raises:
        UnsupportedError: a source of a variable that there is no such thing of here, or no command.
    """
    container = main_container(pod)
    paths = _Paths.of(container, place)
    names = _gang_names(pod)

    def localize(text: str) -> str:
        return names.sub(LOOPBACK, paths.rewrite(text))

    stated = _stated_environment(pod, container, place)
    env = {name: base[name] for name in FROM_THIS_MACHINE if name in base}
    env |= {name: localize(value) for name, value in stated.items()}
    env |= _local_network(stated, place)
    env["TMPDIR"] = str(paths.folder("/tmp") or place.temporary)  # noqa: S108  the container's, not ours
    if place.gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(place.gpus)
    command = [*(container.get("command") or ()), *(container.get("args") or ())]
    if not command:
        raise UnsupportedError("the pod has no command, and without its image this machine knows none")
    argv = [localize(expand(word, stated)) for word in command]
    folder = container.get("workingDir")
    return Container((*resolve(argv[0]), *argv[1:]), env, Path(paths.rewrite(folder)) if folder else None)


Resolve = Callable[[str], Sequence[str]]
"""From the first word of a command to what starts it here."""


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Expand $(NAME) as Kubernetes does: unknown names stay as they are, $$ is a dollar sign."""

    def replacement(match: re.Match[str]) -> str:
        if match.group() == "$$":
            return "$"
        return variables.get(match.group(1), match.group())

    return _REFERENCE.sub(replacement, text)


@dataclass(frozen=True)
class _Paths:
    """Paths inside the container, and the paths of this machine behind them; the longest first."""

    mounts: Sequence[tuple[str, Path]]

    @classmethod
    def of(cls, container: Manifest, place: Place) -> _Paths:
        mounts = [
            (mount["mountPath"].rstrip("/"), place.folders[mount["name"]] / mount.get("subPath", ""))
            for mount in container.get("volumeMounts") or ()
        ]
        mounts.append((container.get("terminationMessagePath") or TERMINATION_LOG, place.termination_log))
        return cls(sorted(mounts, key=lambda mount: len(mount[0]), reverse=True))

    def folder(self, path: str) -> Path | None:
        """The folder behind a mountPath."""
        return next((folder for mounted, folder in self.mounts if mounted == path), None)

    def rewrite(self, text: str) -> str:
        """Rewrite a path that is mounted or lies below a mount, also behind the `=` of an option."""
        option, equals, value = text.partition("=") if text.startswith("-") else ("", "", text)
        for mounted, folder in self.mounts:
            if value == mounted or (value.startswith(mounted + "/") and mounted not in SHARED_WITH_THIS_MACHINE):
                return f"{option}{equals}{folder}{value[len(mounted) :]}"
        return text


def _gang_names(pod: Manifest) -> re.Pattern[str]:
    """Matches the host names of the gang: <hostname>.<subdomain>, short or in full."""
    subdomain = pod["spec"].get("subdomain")
    if not subdomain:
        return re.compile(r"(?!)")
    namespace = pod["metadata"].get("namespace", "default")
    full = rf"(?:\.{re.escape(namespace)}(?:\.svc(?:\.[a-z0-9.-]*[a-z0-9])?)?)?"
    return re.compile(rf"(?<![\w.-])[a-z0-9-]+\.{re.escape(subdomain)}{full}(?![\w.-])")


def _local_network(stated: Mapping[str, str], place: Place) -> dict[str, str]:
    """Keep the gang on the loopback, with a rendezvous port that is free here."""
    env = {"GLOO_SOCKET_IFNAME": LOOPBACK_INTERFACE, "NCCL_SOCKET_IFNAME": LOOPBACK_INTERFACE}
    if environment.MASTER_PORT in stated:
        env[environment.MASTER_PORT] = str(place.master_port)
    return env


def _stated_environment(pod: Manifest, container: Manifest, place: Place) -> dict[str, str]:
    """The environment that the manifest states, in its order, references to earlier variables expanded."""
    env: dict[str, str] = {}
    for entry in container.get("env") or ():
        if "valueFrom" in entry:
            value = _value_from(entry["name"], entry["valueFrom"], pod, place)
        else:
            value = expand(str(entry.get("value") or ""), env)
        env[entry["name"]] = value
    return env


def _value_from(name: str, source: Mapping[str, Any], pod: Manifest, place: Place) -> str:
    if "fieldRef" in source:
        return _field(name, source["fieldRef"]["fieldPath"], pod, place)
    if "secretKeyRef" in source and source["secretKeyRef"].get("optional"):
        return ""
    raise UnsupportedError(
        f"variable {name}: {', '.join(source)} does not exist on this machine; give the value itself"
    )


def _field(name: str, path: str, pod: Manifest, place: Place) -> str:
    metadata = pod["metadata"]
    fields = {
        "metadata.name": metadata["name"],
        "metadata.namespace": metadata.get("namespace", "default"),
        "metadata.uid": metadata["uid"],
        "spec.nodeName": place.node,
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
