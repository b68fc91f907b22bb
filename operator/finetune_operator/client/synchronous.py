"""The client for code without an event loop, and for notebooks, whose own loop is running already."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

from finetune_contract.outputs.request import ExportRequest
from finetune_contract.phase import Phase
from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.client.asynchronous import AsyncFineTuneJobs

T = TypeVar("T")


class FineTuneJobs:
    """The FineTuneJobs of a namespace; see `AsyncFineTuneJobs` for the arguments and errors of each method.

    jobs = FineTuneJobs("team-a")
    jobs.create(manifest)
    status = jobs.wait("circles")
    """

    def __init__(
        self, namespace: str | None = None, *, kubeconfig: str | Path | None = None, context: str | None = None
    ) -> None:
        """Prepare a client; its requests run in a thread with an event loop of its own."""
        self._jobs = AsyncFineTuneJobs(namespace, kubeconfig=kubeconfig, context=context)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="finetune-jobs", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections, and end the thread."""
        if self._loop.is_closed():
            return
        self._run(self._jobs.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def namespace(self) -> str:
        """The namespace of the jobs."""
        return self._jobs.namespace

    def create(self, job: FineTuneJob | Mapping[str, Any]) -> FineTuneJob:
        """Create a job; return it as stored."""
        return self._run(self._jobs.create(job))

    def get(self, name: str) -> FineTuneJob:
        """Return a job."""
        return self._run(self._jobs.get(name))

    def list(self, selector: str = "") -> tuple[FineTuneJob, ...]:
        """Return all jobs, or those whose labels match a selector."""
        return self._run(self._jobs.list(selector))

    def status(self, name: str) -> FineTuneJobStatus:
        """Return the status of a job."""
        return self._run(self._jobs.status(name))

    def suspend(self, name: str, *, suspend: bool = True) -> FineTuneJob:
        """Let a job save its state and stop, or with `suspend=False` continue; return it."""
        return self._run(self._jobs.suspend(name, suspend=suspend))

    def request_export(self, job: FineTuneJob, request: ExportRequest, *, dry_run: bool = False) -> FineTuneJob:
        """Ask the operator to write outputs from a checkpoint of a job."""
        return self._run(self._jobs.request_export(job, request, dry_run=dry_run))

    def delete(self, name: str) -> None:
        """Delete a job and its pods."""
        self._run(self._jobs.delete(name))

    def wait(
        self, name: str, *, until: Phase | str | None = None, timeout_seconds: float | None = None
    ) -> FineTuneJobStatus:
        """Wait until a job has finished or reached a phase; return its status."""
        return self._run(self._jobs.wait(name, until=until, timeout_seconds=timeout_seconds))

    def logs(
        self, name: str, *, node_rank: int = 0, follow: bool = False, tail_lines: int | None = None
    ) -> Iterator[str]:
        """Yield the lines that a pod of the newest attempt has written."""
        lines = self._jobs.logs(name, node_rank=node_rank, follow=follow, tail_lines=tail_lines)
        try:
            while True:
                try:
                    yield self._run(anext(lines))
                except StopAsyncIteration:
                    return
        finally:
            self._run(lines.aclose())

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the thread. An interrupt cancels it."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise
