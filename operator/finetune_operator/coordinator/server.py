"""POST /v1/beat over aiohttp: size, token, identity, sequence; then the beat is kept and the core is woken.

The cluster starts it and injects whose a token is, what to answer, and whom to wake. It decides nothing about a job.
"""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable
from datetime import datetime

from aiohttp import web
from pydantic import ValidationError

from finetune_contract.heartbeat import BEAT_PATH, MAX_BEAT_BYTES, Heartbeat, Reply
from finetune_operator.coordinator.beats import BeatBook, PodIdentity, mismatch

Reviewer = Callable[[str], Awaitable[PodIdentity | None]]
"""Whose bearer token this is; None: nobody's. On Kubernetes a TokenReview."""
Answer = Callable[[Heartbeat], Reply]
"""What a supervisor is told."""
Wake = Callable[[str, str], None]
"""Called with the namespace and name of a job that has news."""

SHUTDOWN_SECONDS = 1.0
"""How long requests that are under way may take when the server stops."""


class Refused(Exception):  # noqa: N818  an answer, not an error of ours
    """A request that is not taken: its HTTP status and a sentence for the supervisor's log."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = sentence


class Coordinator:
    """The endpoint. One instance serves all jobs of a cluster."""

    def __init__(
        self, book: BeatBook, review: Reviewer, answer: Answer, wake: Wake, clock: Callable[[], datetime]
    ) -> None:
        self._book = book
        self._review = review
        self._answer = answer
        self._wake = wake
        self._clock = clock
        self._runner: web.AppRunner | None = None

    async def start(self, host: str, port: int, context: ssl.SSLContext | None = None) -> int:
        """Listen, over plain HTTP where there is no context; port 0 takes a free one. Return the port.

        Raises:
            OSError: the port is taken.
        """
        # The request's reader refuses anything larger by itself, whatever Content-Length claims.
        app = web.Application(client_max_size=MAX_BEAT_BYTES)
        app.router.add_post(BEAT_PATH, self._post_beat)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_SECONDS)
        await runner.setup()
        site = web.TCPSite(runner, host, port, ssl_context=context)
        try:
            await site.start()
        except OSError:
            await runner.cleanup()
            raise
        self._runner = runner
        bound: int = runner.addresses[0][1]
        return bound

    async def stop(self) -> None:
        """Close the port and the connections."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _post_beat(self, request: web.Request) -> web.Response:
        try:
            reply = await self._take(request)
        except Refused as refused:
            headers = {"WWW-Authenticate": "Bearer"} if refused.status == web.HTTPUnauthorized.status_code else None
            return web.Response(status=refused.status, text=refused.sentence + "\n", headers=headers)
        return web.Response(text=reply.to_json(), content_type="application/json")

    async def _take(self, request: web.Request) -> Reply:
        # Who speaks comes first: nothing of a stranger's body is read.
        identity = await self._identify(request)
        beat = await _read_beat(request)
        if wrong := mismatch(identity, beat):
            raise Refused(403, wrong)
        if self._book.take(beat, self._clock()):
            self._wake(beat.namespace, beat.job)
        return self._answer(beat)

    async def _identify(self, request: web.Request) -> PodIdentity:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise Refused(401, "the beat has no token: send the pod's as 'Authorization: Bearer <token>'")
        identity = await self._review(token.strip())
        if identity is None:
            raise Refused(401, "the token is not one of a pod that exists here, or it has expired")
        return identity


async def _read_beat(request: web.Request) -> Heartbeat:
    try:
        body = await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        raise Refused(413, f"the beat is larger than {MAX_BEAT_BYTES} bytes") from error
    except ConnectionError as error:
        # Its process has died in the middle of it: nothing is wrong here, and nobody reads the answer.
        raise Refused(400, "the connection was lost within the beat") from error
    try:
        # Parsing 64 KiB takes about a millisecond; larger bodies never come here.
        return Heartbeat.model_validate_json(body)
    except ValidationError as error:
        raise Refused(400, f"this is no beat: {_first_fault(error)}") from error


def _first_fault(error: ValidationError) -> str:
    """The first thing that is wrong, with its path."""
    fault = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in fault["loc"]) or "body"
    return f"{where}: {fault['msg']}"
