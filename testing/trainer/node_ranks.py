"""Ranks on nodes: those of a node have their own network namespace and file of host names. Needs root and Linux."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_contract import environment
from testing.measure.namespaces import ADDRESS, DEVICE
from testing.trainer.ranks import _CONTEXT, DEADLINE_SECONDS, Ranks, _rank, free_port

_NEW_MOUNTS, _NEW_NETWORK = 0x00020000, 0x40000000
_PRIVATE, _RECURSIVE, _BIND = 1 << 18, 1 << 14, 1 << 12
MASTER = "tiny-a1-n0.tiny"
_OWN = f"127.0.0.1 localhost\n{ADDRESS.format(1)} {MASTER}\n"
"""Host names of a node that knows the address of rank 0."""


@dataclass
class NodeRanks(Ranks):
    """The ranks of one attempt, on nodes; see `Ranks`.

    Attributes:
        namespaces: names of the nodes' network namespaces; the number of ranks is a multiple of theirs.
        lost_node: number of a node whose ranks are killed, if any.
        lost_at: the step in which they are killed.
    """

    namespaces: Sequence[str] = ()
    lost_node: int | None = None
    lost_at: int = 0

    def start(self) -> NodeRanks:
        """Start all ranks. As in a pod, the name of rank 0 is known on its own node, on the others after `announce`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "run.json").write_text(self.spec.to_json(), encoding="utf-8")
        for node in range(len(self.namespaces)):
            self._hosts(node).write_text(_OWN if node == 0 else "127.0.0.1 localhost\n", encoding="utf-8")
        port = free_port()
        self.processes = [
            _CONTEXT.Process(target=_rank_on_node, args=(self._variables(rank, port), self._place(rank)))
            for rank in range(self.world_size)
        ]
        for process in self.processes:
            process.start()
        return self

    def announce(self) -> None:
        """Let all nodes know the address of rank 0 as late as a slow name server: after ranks have asked for it."""
        waiting = [rank for rank in range(self.per_node, self.world_size) if self.processes[rank].is_alive()]
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not all(self._log(rank).with_suffix(".unresolved").exists() for rank in waiting):
            assert time.monotonic() < deadline, self.stderr(waiting[0])
            time.sleep(0.002)
        for node in range(1, len(self.namespaces)):
            # In place: the ranks have mounted this file.
            self._hosts(node).write_text(_OWN, encoding="utf-8")

    @property
    def per_node(self) -> int:
        """Number of ranks of a node."""
        return self.world_size // len(self.namespaces)

    def _hosts(self, node: int) -> Path:
        return self.folder / f"hosts-{node}"

    def _place(self, rank: int) -> dict[str, Any]:
        node = rank // self.per_node
        return {
            "namespace": self.namespaces[node],
            "hosts": str(self._hosts(node)),
            "log": str(self._log(rank)),
            "lost_at": self.lost_at if node == self.lost_node else None,
        }

    def _variables(self, rank: int, port: int) -> dict[str, str]:
        return {
            **self._environment(rank, port),
            "LOCAL_RANK": str(rank % self.per_node),
            "LOCAL_WORLD_SIZE": str(self.per_node),
            "MASTER_ADDR": MASTER,
            "GLOO_SOCKET_IFNAME": DEVICE,
            environment.BACKEND: self.extra.get(environment.BACKEND, "gloo"),
        }


def _rank_on_node(env: dict[str, str], place: dict[str, Any]) -> None:
    """Run a rank in the namespaces of its node."""
    _enter(place["namespace"], place["hosts"])
    _note_unresolved(Path(place["log"]).with_suffix(".unresolved"))
    if place["lost_at"] is not None:
        _lose_node_at(place["lost_at"])
    _rank(env, Path(place["log"]), None, saves_all=False)


def _enter(namespace: str, hosts: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    with Path(f"/run/netns/{namespace}").open("rb") as file:
        _check(libc.setns(file.fileno(), _NEW_NETWORK))
    _check(libc.unshare(_NEW_MOUNTS))
    _check(libc.mount(b"none", b"/", None, _PRIVATE | _RECURSIVE, None))
    _check(libc.mount(hosts.encode(), b"/etc/hosts", None, _BIND, None))


def _check(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _note_unresolved(marker: Path) -> None:
    """Create a file when a name is not found."""
    find = socket.getaddrinfo

    def noting_find(*args: Any, **kwargs: Any) -> Any:
        try:
            return find(*args, **kwargs)
        except socket.gaierror:
            marker.touch()
            raise

    socket.getaddrinfo = noting_find


def _lose_node_at(step: int) -> None:
    """Kill this rank at the beginning of a step."""
    from finetune_trainer.train.loop import Loop  # noqa: PLC0415  the tests themselves need no torch

    train_step = Loop.train_step

    def losing_train_step(self: Any) -> Any:
        if self.state.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(self)

    Loop.train_step = losing_train_step  # type: ignore[method-assign]
