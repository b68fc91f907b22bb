"""The socket of a fork server, which forks the ranks: its address and the command of the server. Linux only."""

from __future__ import annotations

import socket
import sys

SERVER_MODULE = "finetune_trainer.supervisor.fork_server"
SHARED = "--shared"
"""Argument of a server that outlives the process that starts it."""


def listen() -> socket.socket:
    """Return a listening socket with a unique abstract name, which needs no file."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(b"")
    listening.listen(64)
    return listening


def address_of(listening: socket.socket) -> str:
    """Return the address of a socket; @ stands for the zero byte of an abstract name."""
    name = listening.getsockname()
    return "@" + name[1:].decode() if isinstance(name, bytes) else str(name)


def raw_address(address: str) -> str:
    """Return the address in the kernel's form."""
    return "\0" + address[1:] if address.startswith("@") else address


def server_command(descriptor: int) -> tuple[str, ...]:
    """Return the command of a fork server that inherits a listening socket as this descriptor."""
    return (sys.executable, "-m", SERVER_MODULE, str(descriptor))
