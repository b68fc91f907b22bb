"""Kopf handlers: Kopf runs the process from start to stop, and watches the nodes.

Only event handlers and activities are used, so Kopf never writes into an object. `cluster.kube.watch.reflector` watches
jobs, pods and their other objects; see docs/adr/0004-caches-of-our-own.md for the reasons.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import Any

import kopf

from finetune_operator.cluster.kube.operator import Operator
from finetune_operator.cluster.kube.watch.nodes import GONE, observe_node

RETRY_SECONDS = 5
"""Delay between two attempts to reach the API server. By default, Kopf stops trying after a while and exits."""
SILENCE_SECONDS = 150.0
"""A watch of the nodes that is silent for longer is restarted."""


def register(operator: Operator, *, watch_nodes: bool = True) -> kopf.OperatorRegistry:
    """Return the Kopf handlers that run an operator."""
    registry = kopf.OperatorRegistry()

    async def start(settings: kopf.OperatorSettings, **_: Any) -> None:
        configure(settings)
        await operator.start()

    logins = itertools.count()

    async def login(**_: Any) -> kopf.ConnectionInfo:
        number = next(logins)
        if number > 0:
            # An API server that has just started may refuse all tokens (401) for a moment.
            await asyncio.sleep(RETRY_SECONDS)
        return await build_connection(operator, number)

    async def stop(**_: Any) -> None:
        await operator.stop()

    async def update_node(type: str | None, name: str, body: kopf.Body, **_: Any) -> None:
        operator.nodes.update(name, GONE if type == "DELETED" else observe_node(body))

    kopf.on.startup(registry=registry)(start)
    kopf.on.login(registry=registry)(login)
    kopf.on.cleanup(registry=registry)(stop)
    if watch_nodes:
        kopf.on.event("", "v1", "nodes", registry=registry)(update_node)

    return registry


def configure(settings: kopf.OperatorSettings) -> None:
    """Configure Kopf: no events, no scan of other resource types, and unlimited retries."""
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.networking.error_backoffs = ConstantBackoff(RETRY_SECONDS)
    settings.networking.connect_timeout = RETRY_SECONDS
    settings.watching.inactivity_timeout = SILENCE_SECONDS
    settings.process.ultimate_exiting_timeout = None
    logging.getLogger("kopf").setLevel(logging.WARNING)


class ConstantBackoff:
    """An unlimited number of equal delays."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __iter__(self) -> itertools.repeat[float]:
        return itertools.repeat(self._seconds)


async def build_connection(operator: Operator, priority: int) -> kopf.ConnectionInfo:
    """Return the credentials of the operator's own client, for Kopf.

    priority: a different number for each login. Kopf never reuses credentials that were refused once, and ends the
    process if it has no others; a new priority makes the same credentials usable after a transient refusal.
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
