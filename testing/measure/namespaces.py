"""Network namespaces that stand for machines, on links of a limited rate. Needs root and Linux.

Called by `bench.exchange`, `bench.cpu_nodes` and tests.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Sequence

ADDRESS = "10.111.0.{}"
"""Address of a node, by its number from 1."""
DEVICE = "eth0"
_BURST = ("burst", "1mb", "latency", "50ms")


def ip(*arguments: str) -> None:
    """Run `ip`."""
    subprocess.run(["ip", *arguments], check=True)


@contextlib.contextmanager
def pair(prefix: str, rate: str) -> Iterator[list[str]]:
    """Yield the names of two namespaces that a link of this rate connects; remove them at the end."""
    names = [f"{prefix}-{number}" for number in range(2)]
    with _namespaces(names):
        ip("link", "add", DEVICE, "netns", names[0], "type", "veth", "peer", "name", DEVICE, "netns", names[1])
        for number, name in enumerate(names, 1):
            _set_up(name, number)
            limit_rate(name, rate)
        yield names


@contextlib.contextmanager
def switched(prefix: str, num_nodes: int, rate: str, delay: str) -> Iterator[list[str]]:
    """Yield the names of namespaces on one switch; remove them at the end.

    Args:
        prefix: start of the names, at most 8 characters.
        num_nodes: number of nodes.
        rate: of each node's link.
        delay: of each packet that a node sends, where the kernel can delay packets; see `limit_rate`.
    """
    names, switch = [f"{prefix}-{number}" for number in range(num_nodes)], f"{prefix}-switch"
    with _namespaces([*names, switch]):
        ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge", "up")
        for number, name in enumerate(names, 1):
            port = f"port{number}"
            ip("link", "add", DEVICE, "netns", name, "type", "veth", "peer", "name", port, "netns", switch)
            ip("-n", switch, "link", "set", port, "master", "bridge", "up")
            _set_up(name, number)
            limit_rate(name, rate, delay)
        yield names


def limit_rate(name: str, rate: str, delay: str = "") -> bool:
    """Limit what a namespace sends to a rate, and delay it.

    Returns:
        Whether packets are delayed. A kernel without the scheduler netem cannot; then only the rate is limited.
    """
    add = ("tc", "-n", name, "qdisc", "add", "dev", DEVICE, "root")
    if delay:
        done = subprocess.run([*add, "netem", "delay", delay, "rate", rate], check=False, capture_output=True)
        if done.returncode == 0:
            return True
    subprocess.run([*add, "tbf", "rate", rate, *_BURST], check=True)
    return False


def has_delay(name: str) -> bool:
    """Return whether a namespace delays what it sends."""
    shown = subprocess.run(["tc", "-n", name, "qdisc", "show"], check=True, capture_output=True, text=True)
    return "netem" in shown.stdout


def _set_up(name: str, number: int) -> None:
    ip("-n", name, "address", "add", f"{ADDRESS.format(number)}/24", "dev", DEVICE)
    ip("-n", name, "link", "set", DEVICE, "up")
    ip("-n", name, "link", "set", "lo", "up")


@contextlib.contextmanager
def _namespaces(names: Sequence[str]) -> Iterator[None]:
    try:
        for name in names:
            ip("netns", "add", name)
        yield
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
