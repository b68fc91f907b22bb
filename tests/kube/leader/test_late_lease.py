"""Writes that the lease does not allow for a moment, because it is renewed late, are tried again by every task."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, cast

import pytest

from finetune_operator.cluster.kube.client import events
from finetune_operator.cluster.kube.client.client import ApiError, Json, KubeApi, NotLeaderError
from finetune_operator.cluster.kube.client.events import EventSender
from finetune_operator.cluster.kube.leader import endpoint_slice
from finetune_operator.cluster.kube.leader.endpoint_slice import EndpointPublisher, LeaderEndpoint
from finetune_operator.cluster.kube.tls import manager
from finetune_operator.cluster.kube.tls.manager import CertificateManager
from finetune_operator.cluster.kube.work import authority
from finetune_operator.cluster.kube.work.node_taints import NodeTainter
from finetune_operator.plan.model.types import Event
from tests.kube.work.test_node_taints import SEEN, job
from tests.plan.fake_cluster import make_job

NOW = datetime(2026, 1, 2, tzinfo=UTC)


class LateLease:
    """An API server for a replica whose lease allows no write at first, in each task."""

    def __init__(self) -> None:
        self.num_refused = 0
        self.written: list[str] = []
        self.has_written = asyncio.Event()

    async def get(self, path: str) -> Json:
        if "/secrets/" in path:
            raise ApiError(404, "NotFound", path)
        return {"metadata": {"uid": "uid", "resourceVersion": "1"}}

    async def request(self, method: str, path: str, *_: object, **__: object) -> Json:
        if self.num_refused < 2:
            self.num_refused += 1
            raise NotLeaderError
        self.written.append(f"{method} {path}")
        self.has_written.set()
        return {"metadata": {"uid": "uid", "resourceVersion": "1"}}

    async def create(self, path: str, _: object) -> Json:
        return await self.request("POST", path)

    async def apply(self, path: str, _: object, manager: str) -> Json:
        del manager
        return await self.request("PATCH", path)


async def send_event(api: Any) -> None:
    sender = EventSender(api, lambda: NOW, "one", busy=lambda: False)
    sender.enqueue(make_job(), Event("AttemptStarted", "attempt 1 started"))
    await _until_written(api, sender.run())


async def keep_endpoint(api: Any) -> None:
    publisher = EndpointPublisher(api, LeaderEndpoint("ns", "svc", "10.0.0.1", 8443))
    await _until_written(api, publisher.keep(0.0))


async def renew_certificate(api: Any) -> None:
    renewal = CertificateManager(api, "ns", "secret", ("svc",), lambda: NOW).renew_periodically(lambda _: None, 0.0)
    await _until_written(api, renewal)


async def distribute_authority(api: Any) -> None:
    await authority.distribute(api, [("ns", "config")], "PEM")


async def taint_nodes(api: Any) -> None:
    tainter = NodeTainter(cast(KubeApi, api), lambda: [job("a", SEEN), job("b", SEEN)], lambda: NOW, 2)
    for _ in range(3):
        await tainter.taint({"node-1": frozenset({"a", "b"})})


async def _until_written(api: LateLease, endless: Any) -> None:
    task, written = asyncio.create_task(endless), asyncio.create_task(api.has_written.wait())
    await asyncio.wait({task, written}, return_when=asyncio.FIRST_COMPLETED)
    assert not task.done(), "the task works on until the term ends"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize(
    ("task", "path"),
    [
        (send_event, "/events"),
        (keep_endpoint, "/endpointslices/svc"),
        (renew_certificate, "/secrets"),
        (distribute_authority, "/configmaps/config"),
        (taint_nodes, "/nodes/node-1"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_task_writes_when_the_lease_is_renewed(
    task: Callable[[Any], Awaitable[None]], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in (
        (events, "LEADER_SECONDS"),
        (endpoint_slice, "LEADER_SECONDS"),
        (manager, "LEADER_SECONDS"),
        (authority, "RETRY_SECONDS"),
    ):
        monkeypatch.setattr(module, name, 0.0)
    api = LateLease()

    async def main() -> None:
        async with asyncio.timeout(60):
            await task(api)

    asyncio.run(main())
    assert api.num_refused == 2
    assert api.written and all(line.endswith(path) for line in api.written)
