"""A kubelet whose pods run a few lines of Python, and functions that wait with a deadline."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune_operator.api import labels, names
from finetune_operator.cluster.local.home import Home
from finetune_operator.cluster.local.kubelet.kubelet import Kubelet, KubeletContext
from finetune_operator.cluster.local.kubelet.pod import Pod
from finetune_operator.cluster.local.ports import JobPorts
from finetune_operator.cluster.local.task_scope import TaskScope
from finetune_operator.cluster.protocol import JobKey

KEY = JobKey("default", "circles")
PATIENCE_SECONDS = 30.0

READY = "import pathlib, signal, sys, time; mark = lambda name: pathlib.Path('/data', name).touch(); "


def utc_now() -> datetime:
    return datetime.now(UTC)


class KubeletHarness:
    """A state folder, and the warnings and changes that its kubelets report."""

    def __init__(self, folder: Path) -> None:
        self.home = Home(folder / "state")
        self.data = folder / "data"
        self.warnings: list[str] = []
        self.configs: dict[str, Mapping[str, str]] = {}
        self.changed = asyncio.Event()

    @asynccontextmanager
    async def kubelet(self) -> AsyncIterator[Kubelet]:
        """Yield a started kubelet and close it after the block. Its pods keep running, as after the end of a runner."""
        async with TaskScope() as tasks:
            ports = JobPorts(self.home.job(KEY).endpoint, self.warnings.append)
            context = KubeletContext(
                now=utc_now,
                spawn=tasks.spawn,
                changed=self.changed.set,
                warn=self.warnings.append,
                configs=self.configs.get,
                master_port=ports.master_port,
            )
            kubelet = Kubelet(self.home, KEY, context)
            try:
                await kubelet.start()
                yield kubelet
            finally:
                kubelet.close()

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition, which is checked after every change of a pod."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not condition():
                self.changed.clear()
                if not condition():
                    await self.changed.wait()

    async def wait_for_file(self, name: str) -> Path:
        """Wait for a file that a pod writes."""
        path = self.data / name
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not path.exists():  # noqa: ASYNC110  another process's file
                await asyncio.sleep(0.005)
        return path

    def python_pod(self, code: str, name: str = "circles-a1-n0", **spec: Any) -> dict[str, Any]:
        """Return a pod that runs Python code. /data in the code is a folder that the test can read."""
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


def terminated_state(pod: Pod) -> dict[str, Any]:
    """Return the `terminated` state of a pod's container."""
    state: dict[str, Any] = pod.value["status"]["containerStatuses"][0]["state"]["terminated"]
    return state
