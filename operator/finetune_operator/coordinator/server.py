"""POST /v1/beat: check size, token, identity and sequence, then store the heartbeat and wake the job.

The cluster starts it and injects how to authenticate tokens, what to reply and which jobs to wake. It makes no decision
about a job.

A supervisor without ranks can ask to wait for news (`Prefer: wait=20`, RFC 7240): then the reply is sent as soon as it
contains something to do. So a pod enters its world at once, and asks much less often until then.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from datetime import datetime
from http import HTTPStatus

from pydantic import ValidationError

from finetune_contract.heartbeat import (
    BEAT_PATH,
    MAX_BEAT_BYTES,
    PREFER,
    Heartbeat,
    Order,
    Reply,
    first_error,
    read_wait_seconds,
)
from finetune_operator.coordinator.beats import HeartbeatStore, PodIdentity, find_mismatch
from finetune_operator.coordinator.changes import JobChanges
from finetune_operator.coordinator.http import BodyTooLargeError, HttpRequest, HttpResponse, HttpServer
from finetune_operator.coordinator.listener import ConnectionLimits, Listener

Authenticator = Callable[[str], Awaitable[PodIdentity | None]]
"""Returns the pod of a bearer token; None if the token is not valid. On Kubernetes by TokenReview."""
Answer = Callable[[Heartbeat], Reply]
"""Returns the reply to a heartbeat."""
Wake = Callable[[str, str], None]
"""Called with the namespace and name of a job whose heartbeats have changed."""

SHUTDOWN_SECONDS = 1.0
"""Time limit for running requests when the server stops."""
BODY_SECONDS = 10.0
"""Time limit for reading a heartbeat after its headers."""
REFUSAL_HEADERS: dict[int, tuple[tuple[str, str], ...]] = {
    HTTPStatus.UNAUTHORIZED: (("WWW-Authenticate", "Bearer"),),
    HTTPStatus.METHOD_NOT_ALLOWED: (("Allow", "POST"),),
}
"""Headers that HTTP requires in such responses."""
DEFAULT_LIMITS = ConnectionLimits()
MIN_BEAT_SECONDS = 0.1
"""Requested interval after a reply that was held until the next heartbeat was due."""


class HeartbeatRefusedError(Exception):
    """A request that is refused, with its HTTP status and a message for the supervisor's log."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class Coordinator:
    """The heartbeat endpoint. One instance serves all jobs of a cluster."""

    def __init__(  # noqa: PLR0913  the cluster injects all of them
        self,
        store: HeartbeatStore,
        authenticate: Authenticator,
        answer: Answer,
        wake: Wake,
        clock: Callable[[], datetime],
        *,
        changes: JobChanges,
    ) -> None:
        """Create an endpoint that does not listen yet.

        Args:
            store: stores the heartbeats.
            authenticate: returns the pod of a token.
            answer: returns the reply to a heartbeat.
            wake: called when the heartbeats of a job have changed.
            clock: current time.
            changes: reports the changes of jobs, on which replies depend; closed by `stop`.
        """
        self._store = store
        self._authenticate = authenticate
        self._answer = answer
        self._wake = wake
        self._clock = clock
        self._changes = changes
        self._server: HttpServer | None = None
        self._listener: Listener | None = None

    async def start(
        self,
        host: str,
        port: int,
        context: ssl.SSLContext | None = None,
        limits: ConnectionLimits = DEFAULT_LIMITS,
    ) -> int:
        """Listen, over plain HTTP if there is no context; port 0 selects a free one. Return the port.

        Raises:
            OSError: the port is in use.
        """
        server = HttpServer(self._respond, MAX_BEAT_BYTES)
        listener = Listener(server.new_connection, limits, context)
        bound = await listener.start(host, port)
        self._server, self._listener = server, listener
        return bound

    async def stop(self) -> None:
        """Close the port and all connections. Replies that are held are sent."""
        self._changes.close()
        if self._listener is not None:
            await self._listener.stop()
        if self._server is not None:
            # Requests in progress still use the listener.
            await self._server.stop(SHUTDOWN_SECONDS)
        self._server = self._listener = None

    async def _respond(self, request: HttpRequest) -> HttpResponse:
        try:
            reply = await self._handle(request)
        except HeartbeatRefusedError as refused:
            return HttpResponse(refused.status, refused.message + "\n", headers=REFUSAL_HEADERS.get(refused.status, ()))
        return HttpResponse(HTTPStatus.OK, reply.to_json(), "application/json")

    async def _handle(self, request: HttpRequest) -> Reply:
        if request.path != BEAT_PATH:
            raise HeartbeatRefusedError(404, f"heartbeats are sent to {BEAT_PATH}")
        if request.method != "POST":
            raise HeartbeatRefusedError(405, f"send heartbeats by POST, not by {request.method}")
        assert self._listener is not None
        # A review of the token may take longer than the time until the first request.
        self._listener.touch(request.transport)
        # Authentication comes first: the body of an unknown sender is not read.
        identity = await self._identify(request)
        self._listener.trust(request.transport)
        beat = await _read_beat(request)
        if message := find_mismatch(identity, beat):
            raise HeartbeatRefusedError(403, message)
        if self._store.record(beat, self._clock()):
            self._wake(beat.namespace, beat.job)
        reply = self._answer(beat)
        wanted = read_wait_seconds(request.headers.get(PREFER.lower(), "")) if beat.waiting or beat.joining else 0.0
        if not wanted or request.is_lost:
            return reply
        # The heartbeat is stored. A supervisor that closes the connection sends another one.
        request.abandonable = True
        request.release()
        return await self._hold(beat, reply, min(wanted, self._changes.hold_seconds()))

    async def _hold(self, beat: Heartbeat, reply: Reply, seconds: float) -> Reply:
        """Return the reply as soon as it contains something to do, at the latest after these seconds."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while not _has_news(beat, reply):
            if (left := until - loop.time()) <= 0:
                return reply.model_copy(update={"beat_seconds": MIN_BEAT_SECONDS})
            await self._changes.wait((beat.namespace, beat.job), left)
            if self._changes.closed:
                break
            reply = self._answer(beat)
        return reply

    async def _identify(self, request: HttpRequest) -> PodIdentity:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise HeartbeatRefusedError(401, "the heartbeat has no token: send it as 'Authorization: Bearer <token>'")
        identity = await self._authenticate(token.strip())
        if identity is None:
            raise HeartbeatRefusedError(401, "the token does not belong to an existing pod, or it has expired")
        return identity


def _has_news(beat: Heartbeat, reply: Reply) -> bool:
    """Return whether a supervisor without ranks has something to do."""
    is_older = reply.attempt is not None and reply.attempt > beat.attempt
    return is_older or reply.world is not None or reply.peer_lost or reply.order is not Order.CONTINUE


async def _read_beat(request: HttpRequest) -> Heartbeat:
    try:
        # Most bodies arrive with the headers, and a timer costs more than to read them.
        async with asyncio.timeout(None if request.is_complete else BODY_SECONDS):
            body = await request.read()
    except TimeoutError as error:
        raise HeartbeatRefusedError(408, f"the heartbeat was not complete after {BODY_SECONDS:g} s") from error
    except BodyTooLargeError as error:
        raise HeartbeatRefusedError(413, f"the heartbeat is larger than {MAX_BEAT_BYTES} bytes") from error
    except ConnectionError as error:
        # The sender has exited during the request: this is not an error of the coordinator.
        raise HeartbeatRefusedError(400, "the connection was lost while the heartbeat was read") from error
    try:
        # Parsing 64 KiB takes about a millisecond; larger bodies were refused before.
        return Heartbeat.model_validate_json(body)
    except ValidationError as error:
        raise HeartbeatRefusedError(400, f"invalid heartbeat: {first_error(error)}") from error
