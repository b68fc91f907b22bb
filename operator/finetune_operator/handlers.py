"""Kopf's part: it runs the process from start to stop, and watches the nodes.

Only event handlers and activities: nothing of Kopf's is ever written into an object. Jobs, pods and what belongs to
them are watched by `cluster.kube.reflector`; docs/adr/0004-caches-of-our-own.md says why.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import Any

import kopf

from finetune_operator.cluster.kube.operator import Operator
from finetune_operator.cluster.kube.watch.nodes import GONE, read_node

RETRY_SECONDS = 5
"""Wait between two tries to reach the API server. Kopf's own default gives up after a while, and ends the process."""
SILENCE_SECONDS = 150.0
"""A watch of the nodes that says nothing for so long is made anew."""


def register(operator: Operator, *, watch_nodes: bool = True) -> kopf.OperatorRegistry:
    """Handlers that drive an operator."""
    registry = kopf.OperatorRegistry()

    async def start(settings: kopf.OperatorSettings, **_: Any) -> None:
        configure(settings)
        await operator.start()

    logins = itertools.count()

    async def login(**_: Any) -> kopf.ConnectionInfo:
        number = next(logins)
        if number > 0:
            # An API server that has just started may refuse everyone's token (401) for a moment.
            await asyncio.sleep(RETRY_SECONDS)
        return await connection(operator, number)

    async def stop(**_: Any) -> None:
        await operator.stop()

    async def see_node(type: str | None, name: str, body: kopf.Body, **_: Any) -> None:
        operator.nodes.see(name, GONE if type == "DELETED" else read_node(body))

    kopf.on.startup(registry=registry)(start)
    kopf.on.login(registry=registry)(login)
    kopf.on.cleanup(registry=registry)(stop)
    if watch_nodes:
        kopf.on.event("", "v1", "nodes", registry=registry)(see_node)

    return registry


def configure(settings: kopf.OperatorSettings) -> None:
    """Kopf's own settings: no events of its own, no look at other kinds of objects, and patience."""
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.networking.error_backoffs = Endless(RETRY_SECONDS)
    settings.networking.connect_timeout = RETRY_SECONDS
    settings.watching.inactivity_timeout = SILENCE_SECONDS
    settings.process.ultimate_exiting_timeout = None
    logging.getLogger("kopf").setLevel(logging.WARNING)


class Endless:
    """Any number of waits of the same length."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __iter__(self) -> itertools.repeat[float]:
        return itertools.repeat(self._seconds)


async def connection(operator: Operator, priority: int) -> kopf.ConnectionInfo:
    """The credentials of the operator's own client, for Kopf's.

    priority: another one at each login. Kopf never takes credentials again that were refused once, and ends the process
    where it has no others; so what may have been a passing refusal comes back as something new.
    """
    configuration = operator.client.configuration
    headers: dict[str, str] = {}
    await operator.client.update_params_for_auth(headers, [], ["BearerToken"], "", "GET", None)
    _scheme, _, token = headers.get("authorization", headers.get("Authorization", "")).partition(" ")
    return kopf.ConnectionInfo(
        server=configuration.host,
        ca_path=configuration.ssl_ca_cert,
        ca_data=configuration.ca_cert_data,
        scheme="Bearer" if token else None,
        token=token or None,
        certificate_path=configuration.cert_file,
        private_key_path=configuration.key_file,
        insecure=not configuration.verify_ssl,
        priority=priority,
    )
