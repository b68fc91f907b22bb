"""Where ranks are forked: the socket of a fork server, its name, and what starts one. Linux only."""

from __future__ import annotations

import socket
import sys

SERVER_MODULE = "finetune_trainer.supervisor.fork_server"
SHARED = "--shared"
"""Argument of a server that outlives whoever starts it."""


def listen() -> socket.socket:
    """A socket under a name that nobody else has, and that leaves no file behind."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(b"")
    listening.listen(64)
    return listening


def address_of(listening: socket.socket) -> str:
    """The name of a socket; @ stands for the zero byte of an abstract one."""
    name = listening.getsockname()
    return "@" + name[1:].decode() if isinstance(name, bytes) else str(name)


def raw_address(address: str) -> str:
    """The name as the kernel wants it."""
    return "\0" + address[1:] if address.startswith("@") else address


def server_command(descriptor: int) -> tuple[str, ...]:
    """What starts a fork server that inherits a listening socket as this descriptor."""
    return (sys.executable, "-m", SERVER_MODULE, str(descriptor))
