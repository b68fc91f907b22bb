"""A coordinator for the supervisor's tests: an HTTP server that records heartbeats."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from finetune_contract.heartbeat import PREFER, Reply

DEADLINE_SECONDS = 20.0
StartSupervisor = Callable[..., subprocess.Popen[str]]
"""Starts a supervisor whose ranks run the given Python text."""


class FakeCoordinator:
    """Records heartbeats and replies with what the test sets."""

    def __init__(self) -> None:
        self.beats: list[dict[str, Any]] = []
        self.tokens: list[str | None] = []
        self.reply = Reply()
        self.waits: list[str | None] = []
        """The time that each sender wants to wait for news."""
        self.times: list[float] = []
        """When each heartbeat arrived, by the monotonic clock."""
        self.status = 200
        self.held = threading.Event()
        """A reply to a sender that wants to wait is sent when this is set."""
        self.held.set()
        self.changed = threading.Condition()
        coordinator = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with coordinator.changed:
                    coordinator.beats.append(json.loads(body))
                    coordinator.tokens.append(self.headers.get("Authorization"))
                    coordinator.waits.append(self.headers.get(PREFER))
                    coordinator.times.append(time.monotonic())
                    coordinator.changed.notify_all()
                if self.headers.get(PREFER):
                    coordinator.held.wait(DEADLINE_SECONDS)
                answer = coordinator.reply.to_json().encode()
                with contextlib.suppress(ConnectionError):
                    self.send_response(coordinator.status)
                    self.send_header("Content-Length", str(len(answer)))
                    self.end_headers()
                    self.wfile.write(answer)

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def wait(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        deadline = time.monotonic() + DEADLINE_SECONDS
        with self.changed:
            while True:
                for beat in self.beats:
                    if wanted(beat):
                        return beat
                assert self.changed.wait(deadline - time.monotonic()), f"no such heartbeat among {self.beats}"
