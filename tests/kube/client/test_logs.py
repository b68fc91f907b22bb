"""Logs of a job by the Python client. A small HTTP server stands in for the API server: nodes of kwok have no logs."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from finetune_operator.client import AsyncFineTuneJobs, FineTuneJobs, JobNotFoundError
from testing.operator.harness import build_job

PAGE = Path(__file__).parents[3] / "docs" / "python.md"
JOBS = "/apis/finetune-operator.io/v1alpha1/namespaces/default/finetunejobs/circles"
PODS = "/api/v1/namespaces/default/pods"


class Server:
    """A job whose second attempt begins after the log of the first one was read."""

    def __init__(self, attempt: int = 1) -> None:
        self.attempt = attempt
        self.phase = "Running"
        self.queries: list[dict[str, str]] = []
        self.app = web.Application()
        self.app.router.add_get(JOBS, self._job)
        self.app.router.add_get(f"{PODS}/{{pod}}", self._pod)
        self.app.router.add_get(f"{PODS}/{{pod}}/log", self._log)

    async def _job(self, _: web.Request) -> web.Response:
        entries = [{"attempt": number, "startedAt": "2026-01-01T00:00:00Z"} for number in range(1, self.attempt + 1)]
        status = {"attempt": self.attempt, "phase": self.phase, "attempts": entries}
        job = build_job("circles")
        return web.json_response({**job, "metadata": {"name": "circles", "namespace": "default"}, "status": status})

    async def _pod(self, request: web.Request) -> web.Response:
        pod = request.match_info["pod"]
        if not re.fullmatch(f"circles-a{self.attempt}-n[01]", pod):
            return web.json_response({"reason": "NotFound", "message": pod}, status=404)
        return web.json_response({"metadata": {"name": pod}, "status": {"phase": "Running"}})

    async def _log(self, request: web.Request) -> web.StreamResponse:
        self.queries.append(dict(request.query))
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(f"{request.match_info['pod']} starts\nstep ".encode())
        await response.write(b"1\n\xff\n")
        if self.attempt == 2:
            self.phase = "Succeeded"
        self.attempt = 2
        return response


@asynccontextmanager
async def serving(server: Server, folder: Path) -> AsyncIterator[Path]:
    """Serve, and yield a kubeconfig."""
    runner = web.AppRunner(server.app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    config: dict[str, Any] = {
        "current-context": "test",
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "clusters": [{"name": "test", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "users": [{"name": "test", "user": {"token": "secret"}}],
    }
    path = folder / "kubeconfig"
    path.write_text(json.dumps(config), encoding="utf-8")
    try:
        yield path
    finally:
        await runner.cleanup()


def test_logs_follow_the_job_into_its_next_attempt(tmp_path: Path) -> None:
    async def test() -> None:
        server = Server()
        async with serving(server, tmp_path) as kubeconfig, AsyncFineTuneJobs(kubeconfig=kubeconfig) as jobs:
            lines = [line async for line in jobs.logs("circles", node_rank=1, follow=True)]
        expected = [[f"circles-a{attempt}-n1 starts", "step 1", "\N{REPLACEMENT CHARACTER}"] for attempt in (1, 2)]
        assert lines == expected[0] + expected[1]
        assert server.queries == [{"container": "trainer", "follow": "true"}] * 2

    asyncio.run(test())


def test_logs_end_with_the_pod_unless_they_follow(tmp_path: Path) -> None:
    async def test() -> None:
        server = Server(attempt=2)
        async with serving(server, tmp_path) as kubeconfig, AsyncFineTuneJobs(kubeconfig=kubeconfig) as jobs:
            lines = [line async for line in jobs.logs("circles", tail_lines=3)]
            with pytest.raises(IndexError, match="has 2 pods"):
                await anext(jobs.logs("circles", node_rank=2))
            with pytest.raises(JobNotFoundError):
                await anext(jobs.logs("squares"))
        assert lines[0] == "circles-a2-n0 starts"
        assert server.queries == [{"container": "trainer", "follow": "false", "tailLines": "3"}]

    asyncio.run(test())


def test_example_of_the_documentation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]

    async def test() -> None:
        async with serving(Server(), tmp_path) as kubeconfig:
            monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
            # The synchronous client works while another loop runs, as in a notebook.
            await asyncio.to_thread(exec, compile(example, str(PAGE), "exec"), {})
            with FineTuneJobs() as jobs:
                assert jobs.namespace == "default"

    asyncio.run(test())
    assert "circles-a2-n0 starts" in capsys.readouterr().out
