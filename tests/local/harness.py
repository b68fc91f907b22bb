"""A kubelet with pods of a few lines of Python, and waiting with a deadline."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune_operator.api import labels, names
from finetune_operator.cluster.local.endpoint import Endpoint
from finetune_operator.cluster.local.home import Home
from finetune_operator.cluster.local.kubelet.kubelet import Kubelet, World
from finetune_operator.cluster.local.kubelet.pod import Pod
from finetune_operator.cluster.local.tasks import Tasks
from finetune_operator.cluster.protocol import JobKey

KEY = JobKey("default", "circles")
PATIENCE_SECONDS = 30.0

READY = "import pathlib, signal, sys, time; mark = lambda name: pathlib.Path('/data', name).touch(); "


def utc_now() -> datetime:
    return datetime.now(UTC)


class Bed:
    """A state folder and what its kubelets say."""

    def __init__(self, folder: Path) -> None:
        self.home = Home(folder / "state")
        self.data = folder / "data"
        self.warnings: list[str] = []
        self.configs: dict[str, Mapping[str, str]] = {}
        self.changed = asyncio.Event()

    @asynccontextmanager
    async def kubelet(self) -> AsyncIterator[Kubelet]:
        """A kubelet from start to close. Leaving the block leaves its pods alive, as the end of a runner does."""
        async with Tasks() as tasks:
            endpoint = Endpoint(self.home.job(KEY).endpoint, self.warnings.append)
            world = World(
                now=utc_now,
                spawn=tasks.spawn,
                changed=self.changed.set,
                warn=self.warnings.append,
                configs=self.configs.get,
                master_port=endpoint.master_port,
            )
            kubelet = Kubelet(self.home, KEY, world)
            try:
                await kubelet.start()
                yield kubelet
            finally:
                kubelet.close()

    async def until(self, reached: Callable[[], bool]) -> None:
        """Wait for something that a change of a pod brings about."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not reached():
                self.changed.clear()
                if not reached():
                    await self.changed.wait()

    async def until_file(self, name: str) -> Path:
        """Wait for a file that a pod writes."""
        path = self.data / name
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not path.exists():  # noqa: ASYNC110  another process's file
                await asyncio.sleep(0.005)
        return path

    def python(self, code: str, name: str = "circles-a1-n0", **spec: Any) -> dict[str, Any]:
        """A pod that runs Python code; /data is a folder that the test sees."""
        container = {
            "name": names.CONTAINER,
            "command": [sys.executable, "-c", code.replace("/data", str(self.data))],
            **spec.pop("container", {}),
        }
        self.data.mkdir(exist_ok=True)
        attempt, node_rank = name.rpartition("-a")[2].split("-n")
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": name,
                "namespace": KEY.namespace,
                "labels": {labels.JOB: KEY.name, labels.ATTEMPT: attempt, labels.NODE_RANK: node_rank},
            },
            "spec": {"terminationGracePeriodSeconds": 20, "containers": [container], **spec},
        }


def terminated(pod: Pod) -> dict[str, Any]:
    """How a pod's container ended."""
    state: dict[str, Any] = pod.value["status"]["containerStatuses"][0]["state"]["terminated"]
    return state
