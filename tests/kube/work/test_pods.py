"""Requests about pods to an API server without the feature; a stub stands in for one, because ours serves all."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, cast

import pytest

from finetune_operator.cluster.kube.client.client import ApiError, KubeApi
from finetune_operator.cluster.kube.work.pods import PodRequests
from finetune_operator.plan.model.types import ResizePod

POD = {"metadata": {"name": "a", "namespace": "team"}, "spec": {"hostUsers": False, "containers": []}}
GROWN = ResizePod("a", "uid-a", "12Gi")


class OldApiServer:
    """Drops fields, or refuses requests."""

    def __init__(self, error: ApiError | None = None, drops: str = "hostUsers") -> None:
        self.error = error
        self.requests: list[tuple[str, str]] = []
        self._drops = drops

    async def request(self, method: str, path: str, body: Any = None, **_: Any) -> dict[str, Any]:
        self.requests.append((method, path))
        if self.error is not None:
            raise self.error
        return {**body, "spec": {name: value for name, value in body["spec"].items() if name != self._drops}}

    async def create(self, path: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
        return {"metadata": (await self.request("POST", path, manifest))["metadata"]}

    async def get(self, path: str) -> dict[str, Any]:
        return await self.request("GET", path, {"spec": {}})


def requests(api: OldApiServer) -> PodRequests:
    return PodRequests(cast("KubeApi", api))


@pytest.mark.parametrize(("drops", "expected"), [("hostUsers", ["the API server ignores hostUsers"]), ("", [])])
def test_ignored_user_namespaces_are_reported_once(
    drops: str, expected: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    async def create_twice() -> None:
        pods = requests(OldApiServer(drops=drops))
        for _ in range(2):
            assert (await pods.create("team", POD))["metadata"] == POD["metadata"]

    with caplog.at_level(logging.WARNING):
        asyncio.run(create_twice())
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == expected


@pytest.mark.parametrize(
    ("error", "served"),
    [(ApiError(404, "NotFound", "no such group"), False), (ApiError(503, "", "busy"), True), (None, True)],
)
def test_claims_are_unserved_only_if_the_api_is_missing(error: ApiError | None, served: bool) -> None:
    async def ask_twice() -> None:
        api = OldApiServer(error)
        pods = requests(api)
        assert [await pods.serves_claims() for _ in range(2)] == [served, served]
        # An answer that they are missing is kept: a refused job is not worth a request in each reconcile.
        assert len(api.requests) == (2 if served else 1)

    asyncio.run(ask_twice())


@pytest.mark.parametrize("status", [403, 404, 422])
def test_refused_resize_is_logged_and_not_repeated(status: int, caplog: pytest.LogCaptureFixture) -> None:
    async def resize() -> None:
        api = OldApiServer(ApiError(status, "", "no"))
        pods = requests(api)
        for _ in range(2):
            assert await pods.resize("team", GROWN) is None
        assert api.requests == [("PATCH", "/api/v1/namespaces/team/pods/a/resize")]
        # More memory is another request, and so is a new pod with the same UID after the old one is forgotten.
        await pods.resize("team", ResizePod("a", "uid-a", "18Gi"))
        pods.forget("uid-a")
        await pods.resize("team", GROWN)
        assert len(api.requests) == 3

    with caplog.at_level(logging.WARNING):
        asyncio.run(resize())
    assert "the memory of the pod a cannot be raised to 12Gi" in caplog.text


def test_resize_is_repeated_while_the_api_server_does_not_answer() -> None:
    async def resize() -> None:
        pods = requests(OldApiServer(ApiError(503, "", "busy")))
        for _ in range(2):
            with pytest.raises(ApiError):
                await pods.resize("team", GROWN)
        deleted = requests(OldApiServer(ApiError(409, "Conflict", "another UID")))
        assert await deleted.resize("team", GROWN) is None

    asyncio.run(resize())
