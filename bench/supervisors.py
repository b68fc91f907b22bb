"""Supervisors without ranks: thousands of them in one process, each with a pod's token and its own connection.

Used by the benchmarks of the operator and of its coordinator. They send heartbeats and follow replies like real
supervisors; the benchmark determines whether their ranks train or have lost a peer.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import (
    BEAT_PATH,
    PREFER,
    WAIT_SECONDS,
    Heartbeat,
    RankEnd,
    RankReport,
    RankState,
    Reply,
)
from finetune_operator.api import labels
from finetune_operator.settings import Settings
from testing.controlplane.process import LOOPBACK

RETRY_SECONDS = 1.0
TOTAL_STEPS = 100_000


@dataclass
class HeartbeatCounts:
    """Measurements of all supervisors."""

    latencies: list[float] = field(default_factory=list)
    """Seconds from each heartbeat to its reply."""
    refused: int = 0
    unanswered: int = 0
    num_connected: int = 0


class BenchSupervisor:
    """The supervisor of one pod."""

    def __init__(self, pod: dict[str, Any], token: str, counts: HeartbeatCounts, *, steady: bool = True) -> None:
        """Create the supervisor of a pod in its API form.

        steady: whether all heartbeats report the same step; otherwise each reports another step.
        """
        meta, own = pod["metadata"], pod["metadata"]["labels"]
        self.job: str = own[labels.JOB]
        self.pod: str = meta["name"]
        self.node_rank = int(own[labels.NODE_RANK])
        self.attempt = int(own[labels.ATTEMPT])
        self.sequence = 0
        self._identity = {
            "job": self.job,
            "namespace": meta["namespace"],
            "job_uid": meta["ownerReferences"][0]["uid"],
            "pod": meta["name"],
            "pod_uid": meta["uid"],
            "node_rank": self.node_rank,
        }
        self._counts = counts
        self._steady = steady
        self._step = 0
        self._state = RankState.STARTING
        self._changed = asyncio.Event()
        self._head = (
            f"POST {BEAT_PATH} HTTP/1.1\r\nHost: {LOOPBACK}\r\nAuthorization: Bearer {token}\r\n"
            "Content-Type: application/json\r\nContent-Length: "
        )
        self._last_reply = b""
        self.is_joining = False
        """Whether it must ask where rank 0 is before its ranks start."""
        self.joined: Callable[[BenchSupervisor], None] = BenchSupervisor.train
        """Called when its ranks have joined an attempt; they train from `train` on."""
        self.beat_seconds = Settings().beat_seconds

    async def run(self, port: int, context: ssl.SSLContext, spread_seconds: float | None = None) -> None:
        """Send heartbeats until cancelled; the first within `spread_seconds` (default: the heartbeat interval)."""
        spread = self.beat_seconds if spread_seconds is None else spread_seconds
        await asyncio.sleep(random.uniform(0, spread))
        if not self.is_joining:
            self._join()
        while True:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await self._exchange_heartbeats(port, context)
            self._counts.unanswered += 1
            await asyncio.sleep(RETRY_SECONDS)

    def lose_peer(self) -> None:
        """Report immediately that the ranks have ended because of a lost peer, and wait for a new world."""
        self._state = RankState.FAILED
        self._changed.set()

    @property
    def has_joined(self) -> bool:
        """Return whether its ranks belong to the newest attempt that it knows."""
        return self._state in (RankState.RESTORING, RankState.TRAINING)

    def train(self) -> None:
        """Report that the ranks train."""
        self._state = RankState.TRAINING
        self._step += 1
        self._changed.set()

    def _join(self) -> None:
        self._state = RankState.RESTORING
        self.joined(self)

    async def _exchange_heartbeats(self, port: int, context: ssl.SSLContext) -> None:
        reader, writer = await asyncio.open_connection(LOOPBACK, port, ssl=context, server_hostname=LOOPBACK)
        self._counts.num_connected += 1
        try:
            while True:
                self._changed.clear()
                started = time.monotonic()
                status, body = await self._post(reader, writer)
                self._counts.latencies.append(time.monotonic() - started)
                if status != 200:
                    self._counts.refused += 1
                elif body != self._last_reply:
                    self._last_reply = body
                    self._apply_reply(Reply.model_validate_json(body))
                with contextlib.suppress(TimeoutError):
                    left = self.beat_seconds - (time.monotonic() - started)
                    await asyncio.wait_for(self._changed.wait(), max(0.0, left))
        finally:
            self._counts.num_connected -= 1
            writer.close()

    def _apply_reply(self, reply: Reply) -> None:
        self.beat_seconds = reply.beat_seconds or self.beat_seconds
        if reply.world is not None and reply.world.attempt > self.attempt - self.is_joining:
            self.is_joining = False
            self.attempt = reply.world.attempt
            self._identity["node_rank"] = reply.world.node_rank
            self._changed.set()
            self._join()

    async def _post(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[int, bytes]:
        body = self._build_heartbeat().to_json().encode()
        waits = self.is_joining or self._state is RankState.FAILED
        prefer = f"\r\n{PREFER}: wait={WAIT_SECONDS:.0f}" if waits else ""
        writer.write(f"{self._head}{len(body)}{prefer}\r\n\r\n".encode() + body)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        return int(lines[0].split(" ")[1]), await reader.readexactly(int(headers["content-length"]))

    def _build_heartbeat(self) -> Heartbeat:
        self.sequence += 1
        rank = self._identity["node_rank"]
        lost = self._state is RankState.FAILED
        reached = self._step if self._steady else self.sequence
        step = None if self._state in (RankState.STARTING, RankState.RESTORING) else reached
        report = RankReport(
            rank=rank, state=self._state, step=step, total_steps=TOTAL_STEPS, loss=0.1, images_per_second=9.5
        )
        end = RankEnd(rank=rank, exit_code=ExitCode.FABRIC, last_words="lost a peer")
        return Heartbeat(
            **self._identity,
            attempt=self.attempt,
            sequence=self.sequence,
            ranks=(report,),
            ends=(end,) if lost else (),
            waiting=lost,
            joining=self.is_joining,
        )
