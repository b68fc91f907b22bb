"""Containerd, runc and the CNI plugins for real nodes, from Debian packages.

The packages are unpacked into the cache and not installed, so no service starts automatically.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from testing.controlplane.build import PrintLine, cache_folder

PACKAGES = ("containerd", "runc", "containernetworking-plugins")
TOOLS = ("ip", "iptables", "nsenter", "unshare", "buildah", "debootstrap", "apt-get", "dpkg", "gcc")
"""Programs of the machine that are used directly."""


class MissingError(RuntimeError):
    """The machine lacks a requirement. The message names it and the remedy."""


@dataclass(frozen=True)
class Runtime:
    """Paths of the programs."""

    root: Path

    @property
    def containerd(self) -> Path:
        return self.root / "usr/bin/containerd"

    @property
    def ctr(self) -> Path:
        return self.root / "usr/bin/ctr"

    @property
    def runc(self) -> Path:
        return self.root / "usr/sbin/runc"

    @property
    def cni(self) -> Path:
        return self.root / "usr/lib/cni"

    @property
    def shims(self) -> Path:
        return self.root / "usr/bin"


def check_machine() -> None:
    """Raise MissingError if this machine cannot run nodes."""
    if os.geteuid() != 0:
        raise MissingError("real nodes need root, to create namespaces, mounts and cgroups")
    check_tools(TOOLS)
    own = ("--net", "--pid", "--mount", "--uts", "--ipc", "--fork")
    refused = subprocess.run(["unshare", *own, "true"], capture_output=True, text=True, check=False)
    if refused.returncode != 0:
        raise MissingError(f"this machine does not allow root to create namespaces: {refused.stderr.strip()}")
    memory = Path("/sys/fs/cgroup/memory")
    if not memory.is_dir() or not os.access(memory, os.W_OK):
        raise MissingError("this release of runc needs cgroup v1 hierarchies that root can write to")


def check_tools(tools: Sequence[str]) -> None:
    """Raise MissingError if one of the programs is not on PATH."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        raise MissingError(f"not on PATH: {', '.join(missing)}; on Debian run `make system-packages` as root")


def ensure_runtime(print_line: PrintLine) -> Runtime:
    """Unpack the packages unless the cache contains them."""
    target = cache_folder().parent / "realnodes" / "runtime"
    if not (target / "usr/bin/containerd").exists():
        print_line(f"unpacking {', '.join(PACKAGES)}")
        partial = target.with_name("runtime.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _run("apt-get", "-qq", "download", *PACKAGES, cwd=partial)
        for package in partial.glob("*.deb"):
            _run("dpkg", "-x", str(package), str(partial))
            package.unlink()
        partial.rename(target)
    return Runtime(target)


def _run(*command: str, cwd: Path | None = None) -> None:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise MissingError(f"{' '.join(command)} failed: {result.stderr}")
