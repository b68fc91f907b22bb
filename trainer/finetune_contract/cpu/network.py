"""The network interface and the libfabric provider of the ranks. Decisions are pure; `read_network` looks around."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

LOOPBACK = "lo"
ROUTES = Path("/proc/net/route")
INTERFACES = Path("/sys/class/net")
FABRICS = Path("/sys/class/infiniband")
FABRIC_DEVICES = Path("/dev/infiniband")
TCP = "tcp"
PROVIDERS = {"efa": "efa", "mlx5_core": "verbs;ofi_rxm", "mlx4_core": "verbs;ofi_rxm", "irdma": "verbs;ofi_rxm"}
"""libfabric's provider for each driver of a network adapter."""
_UP = 0x1


@dataclass(frozen=True)
class Network:
    """How the ranks reach each other."""

    interface: str
    """Name of the interface; empty: the library chooses."""
    provider: str
    """libfabric's provider."""
    reason: str
    """Why both were chosen; for the log."""


def read_network(is_local: bool, provider_folders: Iterable[Path] = ()) -> Network:
    """Choose the network of this pod.

    Args:
        is_local: whether all ranks of the gang run on this machine.
        provider_folders: folders with the libraries of libfabric's providers (libverbs-fi.so, ...).
    """
    try:
        routes = ROUTES.read_text(encoding="ascii")
    except OSError:
        routes = ""
    drivers = {
        path.name: (path / "device/driver").resolve().name for path in sorted(FABRICS.glob("*")) if FABRICS.is_dir()
    }
    can_open = any(os.access(path, os.R_OK | os.W_OK) for path in FABRIC_DEVICES.glob("uverbs*"))
    installed = {path.name for folder in provider_folders for path in folder.glob("lib*-fi.so")}
    names = sorted(path.name for path in INTERFACES.glob("*")) if INTERFACES.is_dir() else []
    return choose_network(is_local, routes, names, drivers if can_open else {}, installed)


def choose_network(
    is_local: bool, routes: str, interfaces: Iterable[str], drivers: Mapping[str, str], installed: Iterable[str]
) -> Network:
    """Return the interface of the default route, and a fabric's provider only if its adapter and library exist.

    Args:
        is_local: whether all ranks of the gang run on this machine.
        routes: content of /proc/net/route.
        interfaces: names of all interfaces.
        drivers: driver of each fabric adapter that this process may open.
        installed: file names of the libraries of libfabric's providers.
    """
    if is_local:
        return Network(LOOPBACK, TCP, "all ranks run on this machine")
    others = [name for name in interfaces if name != LOOPBACK]
    interface = default_interface(routes)
    why = f"{interface} has the default route"
    if not interface and len(others) == 1:
        interface, why = others[0], f"{others[0]} is the only interface"
    elif not interface:
        why = "no interface has the default route: the library chooses one"
    for adapter, driver in sorted(drivers.items()):
        provider = PROVIDERS.get(driver)
        if provider is not None and _has_library(provider, installed):
            return Network(interface, provider, f"{why}; adapter {adapter} ({driver})")
    missing = f"; no provider is installed for {', '.join(sorted(drivers))}" if drivers else "; no fabric adapter"
    return Network(interface, TCP, why + missing)


def _has_library(provider: str, installed: Iterable[str]) -> bool:
    """Return whether the library of a provider is installed, e.g. libverbs-fi.so or libverbs-1.12-fi.so."""
    pattern = re.compile(rf"lib{provider.partition(';')[0]}(-[0-9.]+)?-fi\.so")
    return any(pattern.fullmatch(name) for name in installed)


def default_interface(routes: str) -> str:
    """Return the interface of the default route with the lowest metric; empty if there is none."""
    found: list[tuple[int, str]] = []
    for line in routes.splitlines()[1:]:
        fields = re.split(r"\s+", line.strip())
        if len(fields) >= 8 and fields[1] == "00000000" and fields[7] == "00000000" and int(fields[3], 16) & _UP:
            found.append((int(fields[6]), fields[0]))
    return min(found, default=(0, ""))[1]
