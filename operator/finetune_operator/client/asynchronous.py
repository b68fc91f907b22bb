"""The client's requests, as coroutines. `synchronous` wraps them for code without an event loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any, Self

from kubernetes.aio import config

from finetune_contract.outputs.request import ExportRequest
from finetune_contract.phase import FINISHED, Phase
from finetune_operator.api.job import API_VERSION, KIND, FineTuneJob
from finetune_operator.api.labels import EXPORT
from finetune_operator.api.names import CONTAINER, pod_name
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.api.validate import parse_job
from finetune_operator.cluster.kube.client.client import (
    BAD_REQUEST,
    GONE,
    MERGE,
    NOT_FOUND,
    ApiError,
    Json,
    KubeApi,
    SetupError,
    connect,
)
from finetune_operator.cluster.kube.client.clock import ServerClock
from finetune_operator.cluster.kube.client.objects import JOBS, PODS
from finetune_operator.plan.model.view import members_of

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
WATCH_SECONDS = "240"
RETRY_SECONDS = 1.0
"""Delay after an error of the API server, and between two tries to read the log of a pod that does not run yet."""


class JobNotFoundError(LookupError):
    """The job does not exist, or was deleted during the wait."""


class JobFailedError(RuntimeError):
    """The job has failed; `status` contains the reason."""

    def __init__(self, name: str, status: FineTuneJobStatus) -> None:
        super().__init__(f"{name} has failed: {status.reason}: {status.message}")
        self.status = status


class AsyncFineTuneJobs:
    """The FineTuneJobs of a namespace.

    async with AsyncFineTuneJobs("team-a") as jobs:
        await jobs.create(manifest)
        status = await jobs.wait("circles")
    """

    def __init__(
        self, namespace: str | None = None, *, kubeconfig: str | Path | None = None, context: str | None = None
    ) -> None:
        """Prepare a client; it connects at the first request.

        Args:
            namespace: default: that of the context, or of the pod that this process runs in.
            kubeconfig: default: $KUBECONFIG or ~/.kube/config; in a pod without them, its service account.
            context: context of the kubeconfig; default: the current one.
        """
        self._kubeconfig = _find_kubeconfig(kubeconfig)
        self._context = context
        self._namespace = namespace
        self._api: KubeApi | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        if self._api is not None:
            await self._api.close()
            self._api = None

    @property
    def namespace(self) -> str:
        """The namespace of the jobs."""
        if self._namespace is None:
            self._namespace = _current_namespace(self._kubeconfig, self._context)
        return self._namespace

    async def create(self, job: FineTuneJob | Mapping[str, Any]) -> FineTuneJob:
        """Create a job; return it as stored.

        Raises:
            InvalidJob: the manifest is invalid; the message names the field, the problem and the remedy.
            ApiError: the API server refuses it.
        """
        manifest = to_manifest(job)
        parse_job(manifest)
        manifest["metadata"] = {**manifest["metadata"], "namespace": self.namespace}
        api = await self._connect()
        body = await api.request("POST", JOBS.path(self.namespace), manifest, query={"fieldValidation": "Strict"})
        return read_job(body)

    async def get(self, name: str) -> FineTuneJob:
        """Return a job.

        Raises:
            JobNotFoundError: it does not exist.
        """
        api = await self._connect()
        with_name = JOBS.path(self.namespace, name)
        try:
            return read_job(await api.get(with_name))
        except ApiError as error:
            if error.status == NOT_FOUND:
                raise JobNotFoundError(f"no FineTuneJob {name} in the namespace {self.namespace}") from None
            raise

    async def list(self, selector: str = "") -> tuple[FineTuneJob, ...]:
        """Return all jobs, or those whose labels match a selector, e.g. 'team=a'."""
        api = await self._connect()
        query = {"labelSelector": selector} if selector else None
        return tuple(read_job(item) for item in (await api.get(JOBS.path(self.namespace), query))["items"])

    async def status(self, name: str) -> FineTuneJobStatus:
        """Return the status of a job."""
        return (await self.get(name)).status

    async def suspend(self, name: str, *, suspend: bool = True) -> FineTuneJob:
        """Let a job save its state and stop, or with `suspend=False` continue; return it."""
        api = await self._connect()
        change = {"spec": {"suspend": suspend}}
        return read_job(await api.request("PATCH", JOBS.path(self.namespace, name), change, content_type=MERGE))

    async def request_export(self, job: FineTuneJob, request: ExportRequest, *, dry_run: bool = False) -> FineTuneJob:
        """Ask the operator to write outputs from a checkpoint of a job; `status.exports` shows how far it is.

        Args:
            job: the job as read; if it has changed since, the API server refuses the request.
            request: what to write; its id must be new.
            dry_run: only check the permission.

        Raises:
            ApiError: the API server refuses it.
        """
        api = await self._connect()
        meta = {"resourceVersion": job.metadata.resource_version, "annotations": {EXPORT: request.to_json()}}
        path, query = JOBS.path(self.namespace, job.metadata.name), {"dryRun": "All"} if dry_run else None
        return read_job(await api.request("PATCH", path, {"metadata": meta}, content_type=MERGE, query=query))

    async def delete(self, name: str) -> None:
        """Delete a job and its pods. A job that does not exist counts as deleted."""
        api = await self._connect()
        try:
            await api.delete(JOBS.path(self.namespace, name), {"propagationPolicy": "Background"})
        except ApiError as error:
            if error.status != NOT_FOUND:
                raise

    async def wait(
        self, name: str, *, until: Phase | str | None = None, timeout_seconds: float | None = None
    ) -> FineTuneJobStatus:
        """Wait until a job has finished or reached a phase; return its status.

        Args:
            name: name of the job.
            until: phase to wait for, e.g. 'Running'; default: the end of the job.
            timeout_seconds: default: no limit.

        Raises:
            JobFailedError: the job has failed, and that was not the phase to wait for.
            JobNotFoundError: the job does not exist, or was deleted.
            TimeoutError: the time is over.
        """
        phase = Phase(until) if until is not None else None
        async with asyncio.timeout(timeout_seconds), aclosing(self.watch(name)) as changes:
            async for job in changes:
                status = job.status
                if phase is not None and status.phase is phase:
                    return status
                if status.phase is Phase.FAILED:
                    raise JobFailedError(name, status)
                if status.phase in FINISHED:
                    return status
        raise JobNotFoundError(name)

    async def watch(self, name: str) -> AsyncGenerator[FineTuneJob, None]:
        """Yield a job now and after each change, until it is deleted.

        Raises:
            JobNotFoundError: it does not exist, or was deleted.
        """
        api, path = await self._connect(), JOBS.path(self.namespace)
        query = {"fieldSelector": f"metadata.name={name}"}
        while True:
            try:
                page = await api.get(path, query)
                if not page["items"]:
                    raise JobNotFoundError(f"no FineTuneJob {name} in the namespace {self.namespace}")
                yield read_job(page["items"][0])
                since = {"resourceVersion": page["metadata"]["resourceVersion"], "timeoutSeconds": WATCH_SECONDS}
                async with aclosing(api.watch(path, {**query, **since})) as events:
                    async for event in events:
                        if event["type"] == "ERROR":
                            break
                        if event["type"] == "DELETED":
                            raise JobNotFoundError(f"the FineTuneJob {name} was deleted")
                        yield read_job(event["object"])
            except ApiError as error:
                if not error.transient and error.status != GONE:
                    raise
                await asyncio.sleep(RETRY_SECONDS)

    async def logs(
        self, name: str, *, node_rank: int = 0, follow: bool = False, tail_lines: int | None = None
    ) -> AsyncGenerator[str, None]:
        """Yield the lines that a pod of the newest attempt has written.

        Args:
            name: name of the job.
            node_rank: number of the pod in its gang.
            follow: continue with new lines, and with the pods of later attempts, until the job has finished.
            tail_lines: only this number of the newest lines.
        """
        seen = ""
        while True:
            job = await self.get(name)
            pod = _pod_of(job, node_rank)
            if pod is not None and pod != seen and await self._is_readable(pod, follow=follow):
                async with aclosing(self._pod_lines(pod, follow=follow, tail_lines=tail_lines)) as lines:
                    async for line in lines:
                        yield line
                seen = pod
            if not follow or (pod == seen and job.status.phase in FINISHED):
                return
            await asyncio.sleep(RETRY_SECONDS)

    async def _is_readable(self, pod: str, *, follow: bool) -> bool:
        """Return whether the pod exists and its container has started; if not, `follow` waits for it."""
        api = await self._connect()
        try:
            found = await api.get(PODS.path(self.namespace, pod))
        except ApiError as error:
            if error.status == NOT_FOUND:
                return False
            raise
        return not follow or found.get("status", {}).get("phase") != "Pending"

    async def _pod_lines(self, pod: str, *, follow: bool, tail_lines: int | None) -> AsyncGenerator[str, None]:
        api = await self._connect()
        query = {"container": CONTAINER, "follow": str(follow).lower()}
        if tail_lines is not None:
            query["tailLines"] = str(tail_lines)
        try:
            async with aclosing(api.lines(f"{PODS.path(self.namespace, pod)}/log", query)) as lines:
                async for line in lines:
                    yield line.decode(errors="replace").rstrip("\r\n")
        except ApiError as error:
            # The pod was deleted, or its container has not started yet.
            if error.status not in (NOT_FOUND, BAD_REQUEST):
                raise

    async def _connect(self) -> KubeApi:
        if self._api is None:
            self._api = KubeApi(await connect(self._kubeconfig, self._context), ServerClock())
        return self._api


def to_manifest(job: FineTuneJob | Mapping[str, Any]) -> Json:
    """Return a job as a manifest, without status and without fields that were not set."""
    if not isinstance(job, FineTuneJob):
        return dict(job)
    body: Json = job.model_dump(mode="json", by_alias=True, exclude_unset=True)
    body.pop("status", None)
    return {**body, "apiVersion": API_VERSION, "kind": KIND}


def read_job(body: Json) -> FineTuneJob:
    """Return a stored job. Fields of a newer version are ignored."""
    return FineTuneJob.model_validate(body, extra="ignore")


def _pod_of(job: FineTuneJob, node_rank: int) -> str | None:
    """Return the name of a node rank's pod in the newest attempt; None before the first attempt."""
    if job.status.attempt == 0:
        return None
    members = members_of(job.status, job.spec)
    if node_rank >= len(members):
        raise IndexError(f"node_rank {node_rank}: {job.metadata.name} has {len(members)} pods, numbered from 0")
    return pod_name(job.metadata.name, *members[node_rank])


def _find_kubeconfig(given: str | Path | None) -> Path | None:
    """Return the kubeconfig to use; None: the service account of this pod."""
    if given is not None:
        return Path(given).expanduser()
    if path := os.environ.get("KUBECONFIG"):
        return Path(path)
    default = Path("~/.kube/config").expanduser()
    return None if not default.exists() and SERVICE_ACCOUNT.exists() else default


def _current_namespace(kubeconfig: Path | None, context: str | None) -> str:
    if kubeconfig is None:
        return (SERVICE_ACCOUNT / "namespace").read_text(encoding="utf-8").strip()
    try:
        contexts, active = config.list_kube_config_contexts(str(kubeconfig))
    except (config.ConfigException, OSError) as error:
        raise SetupError(f"cannot read the kubeconfig {kubeconfig}: {error}") from error
    chosen = next((each for each in contexts if each["name"] == context), active) if context else active
    return str(chosen["context"].get("namespace") or "default")
