"""The HTTP endpoints /livez, /readyz and /metrics."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from finetune_operator.coordinator.listener import ConnectionLimits, Listener

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
LIMITS = ConnectionLimits(total=256, per_source=64)
"""The kubelet opens a connection for each probe; Prometheus keeps one."""
MAX_BODY_BYTES = 4096
"""Received data that is kept: no request has a body."""


@dataclass(frozen=True)
class ProbeServer:
    """The running server."""

    port: int
    _runner: web.AppRunner
    _listener: Listener

    async def stop(self) -> None:
        """Close the port and all connections."""
        await self._listener.stop()
        await self._runner.cleanup()


async def serve(
    host: str,
    port: int,
    probes: dict[str, Callable[[], bool]],
    registry: CollectorRegistry,
    limits: ConnectionLimits = LIMITS,
) -> ProbeServer:
    """Serve the probes (status 200 or 503) and /metrics; port 0 selects a free one.

    Raises:
        OSError: the port is taken.
    """

    @web.middleware
    async def touch(request: web.Request, handler: Handler) -> web.StreamResponse:
        listener.touch(request.transport)
        return await handler(request)

    app = web.Application(middlewares=[touch], client_max_size=MAX_BODY_BYTES)
    for path, probe in probes.items():
        app.router.add_get(path, _answer(probe))
    app.router.add_get("/metrics", _metrics(registry))
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0, read_bufsize=MAX_BODY_BYTES)
    await runner.setup()
    assert runner.server is not None
    listener = Listener(runner.server, limits)
    try:
        bound = await listener.start(host, port)
    except OSError:
        await runner.cleanup()
        raise
    return ProbeServer(bound, runner, listener)


def _answer(probe: Callable[[], bool]) -> Handler:
    async def answer(_: web.Request) -> web.Response:
        healthy = probe()
        return web.Response(status=200 if healthy else 503, text="ok\n" if healthy else "not ok\n")

    return answer


def _metrics(registry: CollectorRegistry) -> Handler:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return answer
