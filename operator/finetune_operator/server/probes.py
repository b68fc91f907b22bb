"""The HTTP endpoints /livez, /readyz and /metrics."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

Handler = Callable[[web.Request], Awaitable[web.Response]]


async def serve(
    host: str, port: int, probes: dict[str, Callable[[], bool]], registry: CollectorRegistry
) -> web.AppRunner:
    """Serve the probes (status 200 or 503) and /metrics.

    Raises:
        OSError: the port is taken.
    """
    app = web.Application()
    for path, probe in probes.items():
        app.router.add_get(path, _answer(probe))
    app.router.add_get("/metrics", _metrics(registry))
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    return runner


def _answer(probe: Callable[[], bool]) -> Handler:
    async def answer(_: web.Request) -> web.Response:
        healthy = probe()
        return web.Response(status=200 if healthy else 503, text="ok\n" if healthy else "not ok\n")

    return answer


def _metrics(registry: CollectorRegistry) -> Handler:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return answer
